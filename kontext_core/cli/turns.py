"""`kontext turns`: instructions done one after another, kept in a folder that can be gone on with.

The folder holds session.json, a picture and a latent for every turn, and drift.png. Called again on the same folder
the command adds to the session: after the last turn, after any other (--from), or a second try (--redo).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common, recorded
from .edit import FITS, SAMPLERS

if TYPE_CHECKING:
    from ..turns import Session, TurnResult

CHAINS = ("latents", "pictures")
TURN_SETTINGS = {"steps": "num_steps", "guidance": "guidance", "few_step": "few_step", "sampler": "sampler"}


def add(commands: argparse._SubParsersAction) -> None:
    """The parser."""
    parser = commands.add_parser(
        "turns",
        help="do several instructions one after another",
        description="Do several instructions one after another on one picture, keep every turn in a folder, "
        "and measure how far the rest of the picture drifts. Call it again on the folder to go on.",
    )
    parser.add_argument("picture", metavar="PICTURE", help="the first picture")
    parser.add_argument("--folder", required=True, metavar="DIR", help="where the session is kept")
    parser.add_argument("--do", action="append", default=[], metavar="TEXT", help="an instruction; repeat it")
    parser.add_argument(
        "--from", dest="parent", type=common.whole(0), metavar="N", help="start from turn N (0: from PICTURE)"
    )
    parser.add_argument(
        "--redo", type=common.whole(1), metavar="N", help="do turn N again with another --seed"
    )
    parser.add_argument(
        "--seed",
        type=common.whole(0, common.MAX_SEED),
        metavar="S",
        help="of the first new turn; each next is 1 more",
    )
    parser.add_argument("--chain", choices=CHAINS, help="what a turn hands to the next (default: latents)")
    parser.add_argument("--fit", choices=FITS, help="how PICTURE meets the model's sizes (default: stretch)")
    parser.add_argument(
        "--steps", type=common.whole(1), metavar="N", help="denoising steps (default: the model's)"
    )
    parser.add_argument(
        "--guidance", type=float, metavar="G", help="embedded guidance (default: the model's)"
    )
    parser.add_argument(
        "--few-step", type=int, choices=(1, 2, 4), help="1, 2 or 4 steps with a distilled model"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: euler")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    common.add_model_options(parser)
    parser.add_argument(
        "--no-loras",
        action="store_true",
        help="leave out the LoRAs of the turn that is gone on from or redone (--lora replaces them)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Add turns to the session of a folder, do them, measure the drift."""
    from .. import images
    from ..evaluation.drift import draw_drift, measure_drift, to_json
    from ..record import pixel_digest
    from ..turns import Session, run_session

    folder = Path(args.folder)
    picture = images.load_image(args.picture)
    start = pixel_digest(picture.image)
    known = folder / "session.json"
    session = Session.from_json(known.read_text(encoding="utf-8")) if known.is_file() else _new_session(args)
    before = len(session.turns)
    session = _more_turns(args, session, fresh=not known.is_file())
    session = _with_loras(args, session, before)
    done = {number: _load_turn(folder, number, start) for number in range(before)}

    model = common.load_model(args)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def keep(number: int, result: TurnResult) -> None:
        for warning in result.warnings:
            common.say(f"warning: {warning}")
        images.save_image(
            _place(folder, number, ".png"), result.image, picture.alpha, icc_profile=picture.icc_profile
        )
        _save_latent(folder, number, result, start)
        so_far = Session(turns=session.turns[: number + 1], chain=session.chain, settings=session.settings)
        images.write_whole(known, (so_far.to_json() + "\n").encode())
        common.say(
            f"turn {number + 1}: {session.turns[number].instruction}: {_place(folder, number, '.png')}"
        )

    results = run_session(model, picture.image, session, done, on_turn=keep, on_step=common.Progress())
    seconds = time.perf_counter() - started
    order = range(len(session.turns))
    shown = [results[number].image for number in order]
    drift = measure_drift(picture.image, shown, parents=[turn.parent for turn in session.turns])
    drawing = draw_drift(drift, [turn.instruction for turn in session.turns], pictures=shown)
    images.save_image(folder / "drift.png", images.from_pil(drawing).image)
    images.write_whole(folder / "drift.json", (to_json(drift) + "\n").encode())
    if args.json:
        common.print_json(
            {
                "folder": str(folder),
                "model": model.name,
                "chain": session.chain,
                "turns": [_as_json(folder, session, results, drift, number) for number in order],
                "seconds": round(seconds, 4),
                "peak_rss_bytes": common.peak_rss_bytes(),
            }
        )
    else:
        for number in order:
            common.say(f"turn {number + 1}: {drift[number].report()}")
    return 0


def _new_session(args: argparse.Namespace) -> Session:
    from ..turns import Session

    return Session(chain=args.chain or "latents", settings={"fit": args.fit} if args.fit else {})


def _more_turns(args: argparse.Namespace, session: Session, *, fresh: bool) -> Session:
    """The session with the turns that are asked for."""
    fixed = {"chain": session.chain, "fit": session.settings.get("fit")}
    changed = [f"--{name}" for name, value in fixed.items() if getattr(args, name) not in (None, value)]
    if changed and not fresh:
        raise ValueError(
            f"{args.folder} holds a session with its own {' and '.join(changed)}: use a new folder"
        )
    if args.redo is not None:
        if args.do or args.parent is not None or args.seed is None:
            raise ValueError("--redo N takes a --seed, and neither --do nor --from")
        return session.redo(args.redo - 1, args.seed)
    if not args.do:
        raise ValueError("--do is missing: give at least one instruction")
    own = {core: value for name, core in TURN_SETTINGS.items() if (value := getattr(args, name)) is not None}
    seed: int | None = args.seed
    for place, instruction in enumerate(args.do):
        if place == 0 and args.parent is not None:
            session = session.branch(args.parent - 1 if args.parent else None, instruction, seed=seed, **own)
        else:
            session = session.add(instruction, seed=seed, **own)
        seed = None
    return session


def _with_loras(args: argparse.Namespace, session: Session, before: int) -> Session:
    """The session with the LoRAs of its new turns, and those in `args` for the model.

    New turns take --lora; without it those of the turn that the first of them redoes or starts from.
    """
    from dataclasses import replace

    first = session.turns[before]
    like = args.redo - 1 if args.redo is not None else first.parent
    if not args.loras and not args.no_loras and like is not None:
        made = f"turn {like + 1} of {args.folder}"
        args.loras = recorded.find_files(session.turns[like].loras, made, Path(args.folder), args.model)
    loras = recorded.fingerprinted(args.loras)
    new = tuple(replace(turn, loras=loras) for turn in session.turns[before:])
    return replace(session, turns=(*session.turns[:before], *new))


def _place(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"turn-{number + 1:03d}{suffix}"


def _save_latent(folder: Path, number: int, result: TurnResult, start: str) -> None:
    """What the next turn needs of this one: the latent and the exact picture, and what they belong to."""
    import json

    from safetensors.torch import save

    from ..images import write_whole

    metadata = {"start": start, "geometry": json.dumps(result.geometry.to_json())}
    tensors = {
        "latent": result.latent.float().cpu().contiguous(),
        "image": result.image.float().cpu().contiguous(),
    }
    write_whole(_place(folder, number, ".safetensors"), save(tensors, metadata))


def _load_turn(folder: Path, number: int, start: str) -> TurnResult:
    import json

    from safetensors import SafetensorError, safe_open

    from ..geometry import Geometry
    from ..turns import TurnResult

    path = _place(folder, number, ".safetensors")
    try:
        with safe_open(path, "pt") as file:
            metadata, latent, image = (
                file.metadata() or {},
                file.get_tensor("latent"),
                file.get_tensor("image"),
            )
            plan = Geometry.from_json(json.loads(metadata["geometry"]))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): start over in a new folder") from error
    if metadata.get("start") != start:
        raise ValueError(f"{folder} holds the turns of another picture: use a new folder")
    return TurnResult(image=image, latent=latent, geometry=plan)


def _as_json(folder: Path, session: Session, results: dict, drift: list, number: int) -> dict[str, Any]:
    import json

    from ..evaluation.drift import to_json

    turn = session.turns[number]
    return {
        "number": number + 1,
        "instruction": turn.instruction,
        "from": 0 if turn.parent is None else turn.parent + 1,
        "seed": turn.seed,
        "loras": [[name, strength] for name, strength, _ in turn.loras],
        "output": str(_place(folder, number, ".png")),
        "seconds": {key: round(value, 4) for key, value in results[number].seconds.items()},
        "drift": json.loads(to_json([drift[number]]))[0],
    }
