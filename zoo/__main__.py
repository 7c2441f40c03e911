"""What models there are, whether a folder is one, and how one is published.

    python -m zoo list | info NAME | download NAME [--revision REV] | check FOLDER
    python -m zoo push FOLDER you/name --license NAME [--public] [--dry_run]
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import zoo
from zoo.tools.command import Parser, run


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def show_list() -> None:
    """The models that are known by name, and those on this machine."""
    from zoo.families import FAMILIES

    known = [(name, f.name, *facts) for f in FAMILIES for name, facts in f.models.items()]
    print(table([("id", "family", "parameters", "block", "mask"), *known]))
    more = "Fine-tunes of these load as well, and SDAR names that end in -bN with another block."
    print(f"\nblock: - is bidirectional. {more}")
    print("The licence is in each model's card.")
    if zoo.names():
        print("\non this machine:\n" + table([(name, str(folder)) for name, folder in zoo.names().items()]))


def describe(folder: Path) -> None:
    """Family, architecture, template and defaults of a folder, from its JSON files."""
    from zoo import checkpoint, tokenizer
    from zoo.templates import TEMPLATES

    values = zoo.read_json(folder / "config.json")
    print(f"folder    {folder}")
    if values.pop("model_type", None) == "rcd":
        print("family    this project's own run")
        print("config    " + ", ".join(f"{k}={v}" for k, v in values.items()))
        meta = zoo.read_json(folder / "train.json") if (folder / "train.json").is_file() else {}
        for key in ("stage", "data", "command"):
            print(f"{key:10s}{meta.get(key) or 'unknown'}")
        return
    try:
        tokens = tokenizer.load(folder)
    except FileNotFoundError:
        tokens = None
    plan = checkpoint.plan_for(folder, tokens)
    print(f"family    {plan.family}")
    print("config    " + ", ".join(f"{k}={v}" for k, v in asdict(plan.config).items()))
    needs = TEMPLATES[plan.template or "plain"].needs
    lacking = [n for n in needs if tokens is not None and n not in tokens.specials]
    unusable = f" (cannot be used: the tokenizer lacks {', '.join(lacking)})" if lacking else ""
    print(f"template  {plan.template or 'none: plain text'}{unusable}")
    print("sampler   " + ", ".join(f"{k}={v}" for k, v in plan.defaults.items()))
    names = {} if tokens is None else {i: n for n, i in tokens.specials.items()}
    c = plan.config
    for what, ids in {"mask": [c.mask_id], "end": c.eos_ids, "pad": [c.pad_id]}.items():
        print(f"{what:10s}" + ", ".join(f"{i} {names.get(i, '')}".strip() for i in ids))
    there = "no tokenizer in the folder" if tokens is None else f"{tokens.vocab_size:,} ids"
    print(f"tokens    {there}, {plan.config.vocab_size:,} rows")
    for note in plan.notes:
        print(f"note      {note}")


def info(name: str) -> None:
    """What is known about a name. Of an unknown hub id all but the weights is downloaded."""
    from zoo.families import FAMILIES

    for f in FAMILIES:
        if name.partition("@")[0] in f.models and not Path(name).is_dir():
            parameters, block, mask = f.models[name.partition("@")[0]]
            print(f"{name}: {f.name}, {parameters} parameters, block {block}, mask id {mask}")
            print((sys.modules[f.plan.__module__].__doc__ or "").strip())
            return
    describe(zoo.find(name, weights=False))


def check(folder: Path) -> None:
    """Verify a folder from its JSON and the headers of its files; only one-dimensional tensors are read. A
    run of this project is loaded."""
    from zoo import checkpoint, tokenizer

    describe(folder)
    if zoo.read_json(folder / "config.json").get("model_type") == "rcd":
        model = zoo.load(folder).model
        parameters = sum(p.numel() for p in model.parameters())
        print(f"tensors   {len(model.state_dict())}, {parameters:,} parameters: all there")
        return
    try:
        tokens = tokenizer.load(folder)
    except FileNotFoundError:
        tokens = None
    found = checkpoint.entries(folder)
    plan = checkpoint.plan_for(folder, tokens)
    model, tensors = checkpoint.match(plan, found, str(folder))
    thin = [n for n in tensors if len(found[n].shape) == 1]
    bad = [n for n, t in checkpoint.read(found, thin, quiet=True) if not bool(t.isfinite().all())]
    if bad:
        raise ValueError(f"{folder}: not a number in {', '.join(bad)}")
    shapes: dict[tuple, list[str]] = {}
    for n in tensors:
        key = ".".join("N" if part.isdigit() else part for part in n.split("."))
        shapes.setdefault((key, found[n].shape, found[n].dtype), []).append(n)
    rows = [(key, str(list(shape)), dtype, str(len(n))) for (key, shape, dtype), n in shapes.items()]
    print(table([("tensor", "shape", "dtype", "count"), *rows]))
    total = sum(checkpoint.nbytes(e) for e in found.values())
    if (folder / checkpoint.INDEX).is_file() and not (folder / "model.safetensors").is_file():
        stated = zoo.read_json(folder / checkpoint.INDEX).get("metadata", {}).get("total_size", total)
        if stated != total:
            print(f"note      the index says {stated:,} bytes")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(tensors)} tensors, {parameters:,} parameters, {total:,} bytes: all there")
    if tokens is None:
        raise ValueError(f"{folder} has no tokenizer: the weights are complete, but the model cannot be used")


def push(folder: Path, repo: str, licence: str, public: bool, dry_run: bool) -> None:
    """Write the card if there is none, then upload the folder as one commit, private unless public."""
    from zoo.card import write_card
    from zoo.hub import push_to_hub

    if zoo.read_json(folder / "config.json").get("model_type") == "fsdfm":
        raise ValueError(f"{folder} is a model of zoo/rivals/fsdfm, which no other program here can read")
    there = (folder / "README.md").is_file()
    path = write_card(folder, repo, licence)
    print(f"card      {path}{' (as it was: delete it for a new one)' if there else ''}")
    if not dry_run:
        print(f"uploaded  {push_to_hub(folder, repo, private=not public)}")


def answer(args: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises ValueError or OSError in one line."""
    if args.command == "list":
        show_list()
    elif args.command == "info":
        info(args.name)
    elif args.command == "download":
        from zoo.hub import download

        print(download(args.name, args.revision))
    elif not Path(args.folder).is_dir() and args.folder not in zoo.names():
        here = "no such model on this machine (download fetches one from the hub)"
        raise FileNotFoundError(f"no folder {args.folder}, and {here}")
    elif args.command == "push":
        push(zoo.find(args.folder), args.repo, args.license, args.public, args.dry_run)
    else:
        check(zoo.find(args.folder))


def main(argv: list[str] | None = None) -> None:
    """The command line. A mistake is one line on stderr and exit code 2."""
    parser = Parser(__doc__, prog="python -m zoo")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="models known by name, and those on this machine")
    commands.add_parser("info", help="what is known about a name").add_argument("name")
    fetch = commands.add_parser("download", help="fetch a model from the Hugging Face hub into its cache")
    fetch.add_argument("name")
    fetch.add_argument("--revision", help="branch, tag or commit [main]")
    about = "verify a folder, or a model on this machine; a pretrained one is not loaded for it"
    verify = commands.add_parser("check", help=about)
    verify.add_argument("folder")
    about = "write a model card and upload a folder, or a model on this machine, to the hub"
    publish = commands.add_parser("push", help=about)
    publish.add_argument("folder")
    publish.add_argument("repo", metavar="you/name")
    publish.add_argument("--license", default="", help="by its name on the hub; a converted model has its "
                         "origin's. Needed where the folder has no README.md yet")  # fmt: skip
    publish.add_argument("--public", action="store_true", help="a new repository is public, not private")
    publish.add_argument("--dry_run", action="store_true", help="write the card, README.md, and stop there")
    args = parser.parse_args(argv)
    run(lambda: answer(args))


if __name__ == "__main__":
    main()
