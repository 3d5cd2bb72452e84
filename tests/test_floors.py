"""The tree is the architecture: a module imports from lower floors only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "activation_beacon"

# Lowest first. A folder such as cli/ is one module here: inside it, imports are free.
FLOORS = [
    {"errors"},
    {"config"},
    {"layouts", "ratios"},
    {"plan"},
    {"constants", "exact", "matmul", "sizes"},
    {
        "answer_scores",
        "causal",
        "context_checks",
        "context_header",
        "files",
        "json_schema",
        "decoder_inputs",
        "other_inputs",
        "processes",
        "projection",
        "quantized",
        "resuming",
        "room",
        "rope",
        "rows",
        "special_tokens",
    },
    {"entries", "json_lines", "recurrent"},
    {"batch", "cache", "data", "dense", "grouped"},
    {"families", "sites"},
    {"trials"},
    {"adapt", "chunk_inputs", "chunk_memory", "fingerprint", "readout", "row_ends", "unread"},
    {"attachment", "recorded"},
    {"forward"},
    {"at_once", "attached", "ragged"},
    {"generation", "grammar", "persistence", "default_base", "prompts", "books"},
    {"base_models", "model_forward"},
    {"conversation", "model"},
    {"hub", "official", "peers_environment"},
    {"__init__"},
    {"training", "evaluation", "bench"},
    {"server"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

# (importer, imported) on one floor.
ALLOWED_SIDEWAYS: set[tuple[str, str]] = set()


def imported_modules(source: str, parts: tuple[str, ...]) -> set[str]:
    """The package's own modules that the file at `parts` imports at any depth; "__init__" is the package itself."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = ("activation_beacon", *parts[:-1])
            base = ".".join(here[: len(here) + 1 - node.level]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    own = [name.split(".") for name in names if name.split(".")[0] == "activation_beacon"]
    return {name[1] if len(name) > 1 and (len(name) > 2 or name[1] in FLOOR_OF) else "__init__" for name in own}


def broken_imports(source: str, parts: tuple[str, ...]) -> list[str]:
    importer = parts[0].removesuffix(".py")
    return [
        f"{'/'.join(parts)} imports {imported}"
        for imported in sorted(imported_modules(source, parts) - {importer})
        if FLOOR_OF.get(imported, len(FLOORS)) >= FLOOR_OF[importer] and (importer, imported) not in ALLOWED_SIDEWAYS
    ]


def test_modules_import_from_lower_floors_only():
    files = {path.relative_to(PACKAGE).parts: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert files
    unplaced = {parts[0].removesuffix(".py") for parts in files} - FLOOR_OF.keys()
    assert not unplaced, f"give these modules a floor in FLOORS: {sorted(unplaced)}"
    assert not [broken for parts, source in files.items() for broken in broken_imports(source, parts)]


@pytest.mark.parametrize(
    ("parts", "source", "broken"),
    [
        (("cache.py",), "from .entries import take\nfrom activation_beacon.errors import BeaconError", []),
        (
            ("cli", "ask.py"),
            "from ..hub import load\nfrom .options import Ratio\nfrom . import options\nimport torch",
            [],
        ),
        (("training", "trainer.py"), "from activation_beacon import attach", []),
        (("__init__.py",), "from .model import attach", []),
        (("plan.py",), "def f():\n    from . import cache", ["plan.py imports cache"]),
        (("rope.py",), "from .cache import BeaconCache", ["rope.py imports cache"]),
        (("model.py",), "import activation_beacon.cli.ask", ["model.py imports cli"]),
        (("hub.py",), "from activation_beacon import attach", ["hub.py imports __init__"]),
        (("training", "data.py"), "from ..bench.cost import flops", ["training/data.py imports bench"]),
        (("config.py",), "from .unheard_of import x", ["config.py imports unheard_of"]),
    ],
)
def test_a_wrong_import_is_caught(parts, source, broken):
    assert broken_imports(source, parts) == broken
