//! Reads the files that define the groups.

use std::fs::{self, File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Maximum size of all files together.
const BYTES_MAX: u64 = 256 << 20;
const FILES_MAX: usize = 10_000;
/// Maximum depth of subdirectories.
const DEPTH_MAX: usize = 32;

/// The files of a definition in the order of their paths, or the reason why they cannot be used.
/// Two equal observations have the same content, unless a file was changed within the resolution of
/// its times.
pub(super) type Observation = Result<Vec<FileState>, String>;

/// What changes with the content of a file, and can be read quickly.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileState {
    path: PathBuf,
    /// The name in errors: the path within the directory.
    name: String,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    inode: (u64, u64),
}

/// A file with its name and its content.
pub(super) type Document = (String, Vec<u8>);

/// Lists the file, or all files in the directory that end in `.json`. Names that begin with a dot
/// are skipped, such as `.git`, and `..data` in a mounted `ConfigMap`.
pub(super) fn observe(root: &Path) -> Observation {
    let metadata = fs::metadata(root).map_err(|error| cannot_read(root, &error))?;
    let mut files = Vec::new();
    if metadata.is_dir() {
        add_directory(root, root, 0, &mut files)?;
        files.sort();
        if files.is_empty() {
            return Err(format!("{}: contains no file *.json", root.display()));
        }
    } else {
        let name = root.file_name().unwrap_or(root.as_os_str()).to_string_lossy().into_owned();
        files.push(FileState::new(root.to_owned(), name, &metadata)?);
    }
    let size = files.iter().fold(0_u64, |sum, file| sum.saturating_add(file.size));
    if size > BYTES_MAX {
        return Err(format!(
            "{}: contains {size} bytes; at most {BYTES_MAX} are allowed",
            root.display()
        ));
    }
    Ok(files)
}

/// Reads the files of an observation.
pub(super) fn read(files: &[FileState]) -> Result<Vec<Document>, String> {
    let mut documents = Vec::with_capacity(files.len());
    let mut rest = BYTES_MAX;
    for FileState { path, name, size, .. } in files {
        let content = read_file(path, *size, rest).map_err(|error| cannot_read(path, &error))?;
        rest = rest.saturating_sub(content.len() as u64);
        documents.push((name.clone(), content));
    }
    Ok(documents)
}

/// Links to files are followed, but not links to directories, because they may form a cycle.
fn add_directory(
    root: &Path,
    directory: &Path,
    depth: usize,
    files: &mut Vec<FileState>,
) -> Result<(), String> {
    if depth > DEPTH_MAX {
        return Err(format!(
            "{}: has more than {DEPTH_MAX} directories above it",
            directory.display()
        ));
    }
    for entry in fs::read_dir(directory).map_err(|error| cannot_read(directory, &error))? {
        let entry = entry.map_err(|error| cannot_read(directory, &error))?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        let kind = entry.file_type().map_err(|error| cannot_read(&path, &error))?;
        if kind.is_dir() {
            add_directory(root, &path, depth + 1, files)?;
        } else if is_json {
            let metadata = fs::metadata(&path).map_err(|error| cannot_read(&path, &error))?;
            if metadata.is_dir() {
                continue;
            }
            if files.len() == FILES_MAX {
                return Err(format!(
                    "{}: contains more than {FILES_MAX} files *.json",
                    root.display()
                ));
            }
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            files.push(FileState::new(path, name, &metadata)?);
        }
    }
    Ok(())
}

/// Reads at most `max` bytes, because the file may have grown since it was observed.
fn read_file(path: &Path, size: u64, max: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::with_capacity(usize::try_from(size.min(max)).unwrap_or(0) + 1);
    File::open(path)?.take(max + 1).read_to_end(&mut content)?;
    if content.len() as u64 > max {
        return Err(io::Error::other(format!("it has grown beyond {BYTES_MAX} bytes")));
    }
    Ok(content)
}

fn cannot_read(path: &Path, error: &io::Error) -> String {
    format!("{}: cannot read it: {error}", path.display())
}

impl FileState {
    fn new(path: PathBuf, name: String, metadata: &Metadata) -> Result<Self, String> {
        // Opening a FIFO would wait for a writer.
        if !metadata.is_file() {
            return Err(format!("{}: expected a file or a directory", path.display()));
        }
        Ok(Self {
            path,
            name,
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            inode: (metadata.dev(), metadata.ino()),
        })
    }
}

#[cfg(test)]
mod tests {
    use testkit::Scratch;

    use super::*;

    #[test]
    fn directory_is_read_recursively_without_hidden_names() {
        let scratch = Scratch::new("groups");
        let root = scratch.path();
        for directory in ["b/c", ".git", "..data"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        for file in ["b/c/x.json", "a.json", ".git/y.json", ".z.json", "readme.md", "..data/d.json"]
        {
            fs::write(root.join(file), file).unwrap();
        }
        std::os::unix::fs::symlink("..data/d.json", root.join("d.json")).unwrap();
        std::os::unix::fs::symlink("..", root.join("b/cycle.json")).unwrap();
        let files = observe(root).unwrap();
        let documents = read(&files).unwrap();
        let names: Vec<&str> = documents.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a.json", "b/c/x.json", "d.json"]);
        assert_eq!(documents[2].1, b"..data/d.json");
        assert_eq!(observe(root).unwrap(), files);
        fs::write(root.join("..data/d.json"), "changed").unwrap();
        assert_ne!(observe(root).unwrap(), files, "a linked file has changed");
    }

    #[test]
    fn unusable_sources_are_explained() {
        let scratch = Scratch::new("groups");
        let root = scratch.path();
        let reason = |path: &Path| observe(path).unwrap_err();
        assert!(reason(root).ends_with("contains no file *.json"), "{}", reason(root));
        let missing = reason(&root.join("missing.json"));
        assert!(missing.contains("missing.json: cannot read it: No such file"), "{missing}");
        assert!(reason(Path::new("/dev/null")).contains("expected a file"));
        // Takes no space on the disk.
        File::create(root.join("large.json")).unwrap().set_len(BYTES_MAX + 1).unwrap();
        assert!(reason(root).contains("at most 268435456 are allowed"), "{}", reason(root));
        let large = FileState { size: 0, ..observed(root, "small.json") };
        fs::write(&large.path, "{}").unwrap();
        assert!(read_file(&large.path, 0, 1).unwrap_err().to_string().contains("has grown"));
    }

    fn observed(root: &Path, name: &str) -> FileState {
        let path = root.join(name);
        fs::write(&path, "").unwrap();
        observe(&path).unwrap().remove(0)
    }
}
