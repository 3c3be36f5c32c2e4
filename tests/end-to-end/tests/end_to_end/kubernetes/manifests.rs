//! The objects of the overlays, and of other combinations of servers and components.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;
use std::sync::LazyLock;

use parking_lot::Mutex;
use serde_json::Value;

pub(crate) const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

const MANIFESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/kubernetes");

/// In each pair, the second component must come after the first. `docs/kubernetes.md` says so.
const ORDERED: [(&str, &str); 1] = [("monitoring", "routine-cron")];

/// What kubectl builds from one list of servers and components.
#[derive(Debug)]
pub(crate) struct Build {
    pub(crate) name: String,
    pub(crate) is_overlay: bool,
    /// The folder in `servers`.
    pub(crate) servers: String,
    pub(crate) components: Vec<String>,
    pub(crate) items: Vec<Value>,
}

impl Build {
    /// Whether the build contains a component.
    pub(crate) fn has(&self, component: &str) -> bool {
        self.components.iter().any(|name| name == component)
    }

    /// Its workloads.
    pub(crate) fn workloads(&'static self) -> Vec<Workload> {
        let is_workload =
            |kind: &Value| kind == "Deployment" || kind == "StatefulSet" || kind == "CronJob";
        let mine = self.items.iter().filter(|item| is_workload(&item["kind"]));
        mine.map(|item| Workload { build: self, item }).collect()
    }
}

/// The overlays and all combinations: each folder in `servers` with each set of components, and
/// each pair of components in both orders that kubectl accepts.
///
/// # Panics
/// When a tool is missing, kubectl cannot build a combination, or a schema rejects an object.
#[track_caller]
pub(crate) fn builds() -> &'static [Build] {
    static BUILDS: LazyLock<Result<Vec<Build>, String>> = LazyLock::new(build_all);
    BUILDS.as_ref().unwrap_or_else(|error| panic!("{error}"))
}

/// The overlays in `deploy/kubernetes/overlays`.
pub(crate) fn overlays() -> impl Iterator<Item = &'static Build> {
    builds().iter().filter(|build| build.is_overlay)
}

#[track_caller]
pub(crate) fn overlay(name: &str) -> &'static Build {
    overlays().find(|build| build.name == name).unwrap_or_else(|| panic!("no overlay {name}"))
}

fn build_all() -> Result<Vec<Build>, String> {
    let mut lists: Vec<(String, Vec<String>)> = Vec::new();
    let components = folders("components");
    for servers in folders("servers") {
        lists.extend(subsets(&components).into_iter().map(|subset| (servers.clone(), subset)));
    }
    for pair in pairs(&components).filter(|[first, second]| !is_refused([first, second])) {
        let list = (folders("servers").swap_remove(0), pair.to_vec());
        if !lists.contains(&list) {
            lists.push(list);
        }
    }
    let mut sources: Vec<(String, Vec<String>, String, bool)> = Vec::new();
    for (servers, components) in lists {
        let folder = write_overlay(&[&servers], &components);
        sources.push((servers, components, folder, false));
    }
    for name in folders("overlays") {
        let folder = format!("deploy/kubernetes/overlays/{name}");
        let (mut servers, components) = listed(&folder);
        sources.push((servers.swap_remove(0), components, folder, true));
    }
    let folders: Vec<&str> = sources.iter().map(|source| source.2.as_str()).collect();
    let mut built = run_script(&folders)?;
    let builds = sources.into_iter().map(|(servers, components, folder, is_overlay)| {
        let name = folder.rsplit('/').next().unwrap().to_owned();
        let items = built.remove(&name).unwrap();
        Build { name, is_overlay, servers, components, items }
    });
    Ok(builds.collect())
}

/// Builds overlays, and returns the objects of each by the name of its folder, or the errors.
pub(crate) fn run_script(folders: &[&str]) -> Result<BTreeMap<String, Vec<Value>>, String> {
    // The first run installs the tools, so that a second one must not start meanwhile.
    static RUNNING: Mutex<()> = Mutex::new(());
    let _running = RUNNING.lock();
    let mut script = Command::new("scripts/kubernetes-manifests");
    let output = script.args(folders).current_dir(ROOT).output().map_err(|it| it.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
}

/// The names of the folders in a folder of the manifests, sorted.
pub(crate) fn folders(parent: &str) -> Vec<String> {
    let entries = fs::read_dir(format!("{MANIFESTS}/{parent}")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names: BTreeSet<String> = names.collect();
    names.into_iter().collect()
}

/// All sets of the components, each in an order that kubectl accepts.
fn subsets(components: &[String]) -> Vec<Vec<String>> {
    let sets = (0..1_u32 << components.len()).map(|bits| {
        let numbered = components.iter().enumerate();
        let mut set: Vec<String> = numbered
            .filter(|(index, _)| bits >> index & 1 == 1)
            .map(|(_, it)| it.clone())
            .collect();
        for (first, second) in ORDERED {
            let position = |name: &str| set.iter().position(|component| component == name);
            if let (Some(before), Some(after)) = (position(first), position(second))
                && after < before
            {
                set.swap(before, after);
            }
        }
        set
    });
    sets.collect()
}

/// All ordered pairs of different components.
pub(crate) fn pairs(components: &[String]) -> impl Iterator<Item = [String; 2]> {
    let firsts = components.iter();
    firsts
        .flat_map(|first| components.iter().map(move |second| [first.clone(), second.clone()]))
        .filter(|[first, second]| first != second)
}

/// Whether the document forbids this order of two components.
pub(crate) fn is_refused([first, second]: [&str; 2]) -> bool {
    ORDERED.contains(&(second, first))
}

/// Copies the overlay `managed`, changes its lists as `docs/kubernetes.md` describes, and returns
/// the new folder.
pub(crate) fn write_overlay(servers: &[&str], components: &[String]) -> String {
    let path = |folder: &str, name: &str| format!("../../../deploy/kubernetes/{folder}/{name}");
    let servers: Vec<_> = servers.iter().map(|name| path("servers", name)).collect();
    let listed: Vec<_> = components.iter().map(|name| path("components", name)).collect();
    let managed =
        fs::read_to_string(format!("{MANIFESTS}/overlays/managed/kustomization.yaml")).unwrap();
    let overlay = managed
        .replace("[../../servers/external]", &format!("[{}]", servers.join(", ")))
        .replace("components: []", &format!("components: [{}]", listed.join(", ")));
    let names = servers.iter().chain(&listed).map(|path| path.rsplit('/').next().unwrap());
    let name = names.collect::<Vec<_>>().join("+");
    let folder = format!("target/kubernetes-combinations/combination-{name}");
    fs::create_dir_all(format!("{ROOT}/{folder}")).unwrap();
    fs::write(format!("{ROOT}/{folder}/kustomization.yaml"), overlay).unwrap();
    folder
}

/// The servers and the components that an overlay lists.
fn listed(folder: &str) -> (Vec<String>, Vec<String>) {
    let text = fs::read_to_string(format!("{ROOT}/{folder}/kustomization.yaml")).unwrap();
    let listed = |parent: &str| {
        let prefix = format!("../../{parent}/");
        let names = text.split(&prefix).skip(1);
        names.map(|rest| rest.split(['\n', ']', ',']).next().unwrap().to_owned()).collect()
    };
    (listed("servers"), listed("components"))
}

/// The objects of `kind` in an overlay.
pub(crate) fn of_kind<'a>(items: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    items.iter().filter(move |item| item["kind"] == kind)
}

/// The object of this kind and name.
#[track_caller]
pub(crate) fn find<'a>(items: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let is_it = |item: &&Value| item["kind"] == kind && item["metadata"]["name"] == name;
    items.iter().find(is_it).unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

#[track_caller]
pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a string"))
}

/// The elements of a list, which may be missing.
pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A Deployment, a `StatefulSet` or a `CronJob`.
#[derive(Clone, Copy)]
pub(crate) struct Workload {
    pub(crate) build: &'static Build,
    pub(crate) item: &'static Value,
}

/// The workloads of all builds.
pub(crate) fn workloads() -> impl Iterator<Item = Workload> {
    builds().iter().flat_map(Build::workloads)
}

/// One of the workloads of each kind that differ, or whose settings file differs.
pub(crate) fn distinct_workloads() -> Vec<Workload> {
    let mut seen = BTreeSet::new();
    let is_new = |workload: &Workload| {
        seen.insert(format!("{}{}", workload.item, settings_file(&workload.build.items)))
    };
    workloads().filter(is_new).collect()
}

/// The settings file of a build.
pub(crate) fn settings_file(items: &'static [Value]) -> &'static str {
    text(&find(items, "ConfigMap", "lastseen-settings")["data"]["lastseen.env"])
}

impl Workload {
    pub(crate) fn name(&self) -> &'static str {
        text(&self.item["metadata"]["name"])
    }

    /// Identifies the workload in a failed assertion.
    pub(crate) fn place(&self) -> String {
        format!("{} of {}", self.name(), self.build.name)
    }

    fn template(&self) -> &'static Value {
        match text(&self.item["kind"]) {
            "CronJob" => &self.item["spec"]["jobTemplate"]["spec"]["template"],
            _ => &self.item["spec"]["template"],
        }
    }

    pub(crate) fn labels(&self) -> &'static Value {
        &self.template()["metadata"]["labels"]
    }

    pub(crate) fn pod(&self) -> &'static Value {
        &self.template()["spec"]
    }

    /// Its only container.
    pub(crate) fn container(&self) -> &'static Value {
        let [container] = list(&self.pod()["containers"]) else { panic!("not one container") };
        container
    }

    pub(crate) fn command(&self) -> Vec<&'static str> {
        list(&self.container()["command"]).iter().map(text).collect()
    }

    /// The ports of its container by name.
    pub(crate) fn ports(&self) -> BTreeMap<&'static str, u64> {
        let ports = list(&self.container()["ports"]).iter();
        ports.map(|port| (text(&port["name"]), port["containerPort"].as_u64().unwrap())).collect()
    }

    /// The variables in the manifest of the container itself.
    pub(crate) fn own_variables(&self) -> BTreeMap<&'static str, &'static str> {
        let variables = list(&self.container()["env"]).iter();
        variables.map(|variable| (text(&variable["name"]), text(&variable["value"]))).collect()
    }

    /// The variables in the `ConfigMap`s that the container reads.
    pub(crate) fn shared_variables(&self) -> BTreeMap<&'static str, &'static str> {
        let maps = list(&self.container()["envFrom"]).iter();
        let maps = maps
            .map(|from| find(&self.build.items, "ConfigMap", text(&from["configMapRef"]["name"])));
        maps.flat_map(|map| map["data"].as_object().unwrap())
            .map(|(name, value)| (name.as_str(), text(value)))
            .collect()
    }

    /// The volume that contains `path`, and the rest of the path.
    #[track_caller]
    pub(crate) fn volume_at<'a>(&self, path: &'a str) -> (&'static Value, &'a str) {
        let mounts = list(&self.container()["volumeMounts"]).iter();
        let mut mounted = mounts.filter_map(|mount| {
            let rest = path.strip_prefix(text(&mount["mountPath"]))?;
            (rest.is_empty() || rest.starts_with('/')).then_some((&mount["name"], rest))
        });
        let (name, rest) =
            mounted.next().unwrap_or_else(|| panic!("{}: {path} is not mounted", self.place()));
        let volumes = list(&self.pod()["volumes"]).iter();
        let claims = list(&self.item["spec"]["volumeClaimTemplates"]).iter();
        let mut volumes = volumes
            .filter(|volume| volume["name"] == *name)
            .chain(claims.filter(|claim| claim["metadata"]["name"] == *name));
        let volume = volumes.next().unwrap_or_else(|| panic!("there is no volume {name}"));
        (volume, rest.trim_start_matches('/'))
    }
}

/// Whether a selector, or a map of labels, selects these labels.
pub(crate) fn selects(selector: &Value, labels: &Value) -> bool {
    let has = |(name, value): (&String, &Value)| labels[name] == *value;
    let is_selector = selector.get("matchLabels").is_some()
        || selector.get("matchExpressions").is_some()
        || selector.as_object().is_some_and(serde_json::Map::is_empty);
    if !is_selector {
        return selector.as_object().unwrap().iter().all(has);
    }
    let by_labels = selector["matchLabels"].as_object();
    let by_expressions = list(&selector["matchExpressions"]).iter().all(|expression| {
        assert_eq!(expression["operator"], "In", "{expression}");
        list(&expression["values"]).contains(&labels[text(&expression["key"])])
    });
    by_expressions && by_labels.is_none_or(|wanted| wanted.iter().all(has))
}
