"""Writes the Python code of src/cohortium/engines/fleet/v1/fleet.proto beside it.

    python tools/fleet_proto.py            # the code, and the new parts of tests/vectors/fleet_v1.json
    python tools/fleet_proto.py --check    # writes nothing; fails if the code is not what the contract gives

The vectors hold every field and method that was ever published; a change of one is refused.
"""

import json
import sys
import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

PROJECT = Path(__file__).parents[1]
SOURCE = PROJECT / "src"
PROTO = "cohortium/engines/fleet/v1/fleet.proto"
VECTORS = PROJECT / "tests" / "vectors" / "fleet_v1.json"


def generate(target: Path) -> list[Path]:
    """Writes the generated modules and stubs below `target` and returns their paths relative to it."""
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    plugins = Path(sys.executable).parent
    arguments = [f"--plugin=protoc-gen-{kind}={plugins}/protoc-gen-{kind}" for kind in ("mypy", "mypy_grpc")]
    arguments += [f"--{kind}_out={target}" for kind in kinds]
    if protoc.main(["protoc", f"-I{SOURCE}", *arguments, PROTO]):
        raise SystemExit("the contract does not compile")
    return sorted(path.relative_to(target) for path in target.rglob("fleet_pb2*"))


def described() -> FileDescriptorProto:
    """Returns the contract as protoc reads it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        if protoc.main(["protoc", f"-I{SOURCE}", f"--descriptor_set_out={out}", PROTO]):
            raise SystemExit("the contract does not compile")
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def surface(file: FileDescriptorProto) -> dict[str, str]:
    """Returns each field, value and method by name, with what must never change of it."""
    found: dict[str, str] = {}
    for message in file.message_type:
        found |= _fields(message)
    for enum in file.enum_type:
        found |= {f"{enum.name}.{value.name}": f"value {value.number}" for value in enum.value}
    for service in file.service:
        for method in service.method:
            upward = "stream " * method.client_streaming + method.input_type
            downward = "stream " * method.server_streaming + method.output_type
            found[f"{service.name}.{method.name}"] = f"rpc ({upward}) returns ({downward})"
    return {f"{file.package}.{name}": what for name, what in found.items()}


def _fields(message: DescriptorProto) -> dict[str, str]:
    oneofs = [oneof.name for oneof in message.oneof_decl]
    fields: dict[str, str] = {}
    for field in message.field:
        label = FieldDescriptorProto.Label.Name(field.label).removeprefix("LABEL_").lower()
        kind = field.type_name or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        where = f" in {oneofs[field.oneof_index]}" if field.HasField("oneof_index") else ""
        fields[f"{message.name}.{field.name}"] = f"{field.number} {label} {kind}{where}"
    return fields


def broken(published: dict[str, str], now: dict[str, str]) -> list[str]:
    """Returns what was published and is there no longer, or is something else."""
    return sorted(
        f"{name}: was '{what}', is '{now.get(name, 'gone')}'"
        for name, what in published.items()
        if now.get(name) != what
    )


def stale() -> list[str]:
    """Returns the generated files that are not what the contract gives."""
    with tempfile.TemporaryDirectory() as folder:
        paths = generate(Path(folder))
        there = {path: SOURCE / path for path in paths}
        return [
            str(path)
            for path, file in there.items()
            if not file.exists() or file.read_bytes() != (Path(folder) / path).read_bytes()
        ]


def main() -> None:
    """Writes or checks the generated code."""
    if "--check" in sys.argv[1:]:
        if found := stale():
            raise SystemExit(f"not what the contract gives: {', '.join(found)}; run python tools/fleet_proto.py")
        return
    now = surface(described())
    published = json.loads(VECTORS.read_text()) if VECTORS.exists() else {}
    if changed := broken(published, now):
        raise SystemExit("what is published never changes:\n" + "\n".join(changed))
    generate(SOURCE)
    VECTORS.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
