"""Checks Kubernetes objects against schemas: validate.py OVERLAY.yaml...

Objects of Kubernetes itself are checked by kubernetes-validate, in which unknown fields are errors. Custom resources are
checked against custom-resources.yaml. Prints all objects as JSON, {"OVERLAY": [OBJECT, ...], ...}, or the errors.
"""

import functools
import json
import sys
from pathlib import Path

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

# The oldest and the newest version of Kubernetes whose schemas must accept the objects.
VERSIONS = ("1.30", "1.37")


def reject_other_fields(schema):
    """Returns the schema with `additionalProperties: false` for each object whose properties it lists."""
    if isinstance(schema, list):
        return [reject_other_fields(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: reject_other_fields(part) for key, part in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        closed["additionalProperties"] = False
    return closed


def errors_in(item, custom_resources):
    kind = f"{item.get('apiVersion')} {item.get('kind')}"
    if kind in custom_resources:
        unknown = set(item) - {"apiVersion", "kind", "metadata", "spec"}
        yield from (f"{field}: unknown" for field in unknown)
        for error in Draft202012Validator(custom_resources[kind]).iter_errors(item.get("spec")):
            yield f"{'.'.join(map(str, ['spec', *error.path]))}: {error.message}"
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{'.'.join(map(str, error.path))}: {error.message} (Kubernetes {version})"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"Kubernetes {version} and custom-resources.yaml have no {kind}"


@functools.cache
def parse(document):
    """Parses one object. The cache makes this fast, because most objects are the same in all overlays."""
    return yaml.load(document, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def main(files):
    schemas = Path(__file__).with_name("custom-resources.yaml").read_text(encoding="utf-8")
    custom_resources = reject_other_fields(yaml.safe_load(schemas))
    # kubectl writes the separator of documents only on a line of its own that is not indented.
    overlays = {
        Path(file).stem: [parse(document) for document in Path(file).read_text(encoding="utf-8").split("\n---\n")]
        for file in files
    }
    distinct = {json.dumps(item): (overlay, item) for overlay, items in overlays.items() for item in items}
    errors = [
        f"{overlay}: {item.get('kind')} {item.get('metadata', {}).get('name')}: {error}"
        for overlay, item in distinct.values()
        for error in errors_in(item, custom_resources)
    ]
    if errors:
        sys.exit("\n".join(errors))
    json.dump(overlays, sys.stdout)


main(sys.argv[1:])
