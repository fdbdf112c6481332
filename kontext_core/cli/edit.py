"""`kontext edit` and `kontext generate`: one picture from an instruction."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from . import common, recorded

if TYPE_CHECKING:
    from ..record import Record

FITS = ("stretch", "crop", "pad", "keep")
SAMPLERS = ("euler", "heun", "dpmpp_2m", "few_step")
CONVENTIONS = ("offset", "index", "uxo")

BFL_TEXT_LENGTH = 512  # T5 tokens
# What is used where neither the command line nor --like says anything. None leaves it to the model.
DEFAULTS: dict[str, Any] = {
    "steps": None,
    "guidance": None,
    "seed": 0,
    "size": "auto",
    "few_step": None,
    "sampler": "euler",
    "shift": "resolution",
    "fit": "stretch",
    "padding": "mirror",
    "convention": "offset",
    "bfl": False,
    "reuse_context": 1,
    "skip_regions": 0.0,
    "first_block": 0.0,
    "warmup": 2,
}


def add(commands: argparse._SubParsersAction) -> None:
    """The parsers of both commands."""
    edit = commands.add_parser(
        "edit",
        help="edit a picture by instruction",
        description="Edit a picture by instruction. Further pictures are references, as in “the cup of the "
        "second picture”. The result has the size and framing of the first picture.",
    )
    edit.add_argument("pictures", nargs="+", metavar="PICTURE", help="the picture to edit, then references")
    _add_options(edit)
    group = edit.add_argument_group("picture")
    group.add_argument(
        "--fit", choices=FITS, help="how the picture meets the model's sizes (default: stretch, as BFL does)"
    )
    group.add_argument(
        "--padding", metavar="COLOUR", help="around it with --fit pad: mirror (default) or #rrggbb"
    )
    group.add_argument(
        "--convention", choices=CONVENTIONS, help="how references are placed (default: offset)"
    )
    group.add_argument(
        "--preserve",
        action="store_true",
        help="keep every pixel that the edit did not mean to change bit-identical to the original",
    )
    group.add_argument("--mask", metavar="PICTURE", help="white where the edit may show; implies --preserve")
    edit.set_defaults(run=run)

    generate = commands.add_parser(
        "generate", help="make a picture from text", description="Make a picture from text alone."
    )
    _add_options(generate)
    generate.set_defaults(
        run=run, pictures=[], fit=None, padding=None, convention=None, preserve=False, mask=None
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", help="the instruction; needed unless --like gives one")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="picture to write: .png, .jpg or .webp"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--steps", type=common.whole(1), metavar="N", help="denoising steps (default: the model's)"
    )
    group.add_argument("--guidance", type=float, metavar="G", help="embedded guidance (default: the model's)")
    group.add_argument(
        "--seed", type=common.whole(0, common.MAX_SEED), metavar="S", help="seed of the noise (default: 0)"
    )
    group.add_argument(
        "--size",
        type=common.size,
        metavar="WxH|auto",
        help="multiples of 16 (default: auto, the picture's own)",
    )
    group.add_argument(
        "--few-step", type=int, choices=(1, 2, 4), metavar="N", help="1, 2 or 4 steps with a distilled model"
    )
    group.add_argument("--sampler", choices=SAMPLERS, help="default: euler")
    group.add_argument("--shift", help="of the schedule: resolution (default), none, or a number")
    group.add_argument(
        "--bfl", action="store_true", default=None, help="noise, schedule and fit exactly as BFL's own code"
    )
    group.add_argument(
        "--like", metavar="PNG", help="take prompt, settings and LoRAs from this picture's record"
    )
    group.add_argument(
        "--no-loras",
        action="store_true",
        help="leave out the LoRAs of --like's record (--lora replaces them)",
    )
    group = parser.add_argument_group(
        "speed", "approximations, off unless asked for; see benchmarks/run.py context"
    )
    group.add_argument(
        "--reuse-context",
        type=common.whole(1),
        metavar="N",
        help="compute the references' tokens every N-th step only (4 saves about a third)",
    )
    group.add_argument(
        "--skip-regions",
        type=float,
        metavar="D",
        help="leave out what is this near to the picture (0.3 is careful)",
    )
    group.add_argument(
        "--first-block",
        type=float,
        metavar="D",
        help="skip the other blocks while the first changes this little",
    )
    group.add_argument(
        "--warmup",
        type=common.whole(1),
        metavar="N",
        help="first steps that are computed in full (default: 2)",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the blocks first; pays for large pictures"
    )
    common.add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Do one edit, write the picture with its record, say where it is."""
    started = time.perf_counter()
    target = common.check_output(args.output)
    from .. import geometry, images, record
    from ..accelerate import Accelerate
    from ..edit import edit_image
    from ..models.regional import CompileClock, compile_blocks
    from ..preserve import preserve

    known = record.load_record(args.like) if args.like else None
    prompt, settings = _settings(args, known)
    accelerate = Accelerate(
        every=settings["reuse_context"],
        regions=settings["skip_regions"],
        first_block=settings["first_block"],
        warmup=settings["warmup"],
    )
    padding = geometry.parse_padding(settings["padding"])
    pictures = [images.load_image(path) for path in args.pictures]
    alpha = pictures[0].alpha if pictures else None
    if alpha is not None and target.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(
            f"{args.pictures[0]} is transparent and JPEG is not: write --output as .png or .webp"
        )
    mask = _load_mask(args, pictures, settings) if args.mask else None
    if args.preserve and settings["size"] != "auto":
        raise ValueError("--preserve keeps the picture's own size: leave --size at auto")

    if known is not None and not args.loras and not args.no_loras:
        args.loras = recorded.find_loras(known, args.like, args.model)
    for line in recorded.left_out(known, args.like) if known is not None else ():
        common.say(f"warning: {line}")
    model = common.load_model(args, text_length=BFL_TEXT_LENGTH if settings["bfl"] else None)
    loaded = time.perf_counter() - started
    common.say(f"{model.name} loaded in {loaded:.1f} s")
    compiled = args.compile and compile_blocks(
        model.transformer if settings["few_step"] is None else model.few_step or model.transformer
    )
    with CompileClock() if compiled else nullcontext() as clock:
        result = edit_image(
            model,
            [picture.image for picture in pictures] or None,
            prompt,
            num_steps=settings["steps"],
            guidance=settings["guidance"],
            seed=settings["seed"],
            size=settings["size"],
            fit=settings["fit"],
            pad_color=padding,
            shift=settings["shift"],
            sampler=settings["sampler"],
            few_step=settings["few_step"],
            convention=settings["convention"],
            bfl_noise=settings["bfl"],
            accelerate=None if accelerate.off else accelerate,
            on_step=common.Progress(),
        )
    if compiled:
        common.say(f"compiled {clock.graphs} graphs in {clock.seconds:.1f} s, which are part of sampling")
    for warning in result.warnings:
        common.say(f"warning: {warning}")
    if result.geometry is not None:
        common.say(result.geometry.report())
    if result.saved is not None:
        common.say(str(result.saved))
    image = result.images
    if args.preserve or mask is not None:
        kept = preserve(pictures[0].image, image, mask)
        common.say(kept.report())
        image = kept.image
    if alpha is not None and settings["size"] != "auto":
        alpha = geometry.apply(result.geometry, alpha, bounds=(0.0, 1.0))

    weight = next(model.transformer.parameters())
    made = record.Record(
        action=args.command,
        prompts=(prompt,),
        settings={
            **settings,
            "size": settings["size"] if settings["size"] == "auto" else list(settings["size"]),
            "steps": result.steps,
            "guidance": result.guidance,
            "preserve": bool(args.preserve or args.mask),
            "loras": recorded.lora_settings(args.loras),
        },
        inputs=tuple(recorded.stamp_inputs(args.pictures, pictures)),
        weights=tuple(recorded.stamp_weights(args, model, settings["few_step"])),
        versions=record.current_versions(weight.device, weight.dtype),
        pixels=record.pixel_digest(image) if target.suffix.lower() == ".png" else "",
    )
    profile = pictures[0].icc_profile if pictures else None
    text = {record.KEY: made.to_json()} if target.suffix.lower() == ".png" else None
    images.save_image(target, image, alpha, text=text, icc_profile=profile)
    height, width = image.shape[-2:]
    seconds = {"load": loaded, **result.seconds, "total": time.perf_counter() - started}
    phases = ["load", "encode", "sample", "decode", "total"]
    if compiled:
        seconds["compile"] = clock.seconds
        phases.append("compile")
    if args.json:
        common.print_json(
            {
                "output": str(target),
                "width": width,
                "height": height,
                "seed": result.seeds[0],
                "steps": result.steps,
                "guidance": result.guidance,
                "model": model.name,
                "seconds": {key: round(seconds[key], 4) for key in phases},
                "peak_rss_bytes": common.peak_rss_bytes(),
                **({} if result.saved is None else {"saved": result.saved.as_json()}),
            }
        )
    else:
        common.say(f"wrote {target} ({width}x{height}) in {seconds['total']:.1f} s")
    return 0


def _settings(args: argparse.Namespace, known: Record | None) -> tuple[str, dict[str, Any]]:
    """The prompt and every setting: from the command line, else from --like's record, else the default."""
    settings, prompt = dict(DEFAULTS), args.prompt
    if known is not None:
        settings |= {key: known.settings[key] for key in DEFAULTS if key in known.settings}
        said = known.prompts[0] if known.prompts else None
        if "bfl_parity" in known.settings:  # a node's record
            said, own = recorded.node_settings(known, args.like)
            settings |= {
                "fit": DEFAULTS["fit"],
                "sampler": DEFAULTS["sampler"],
                "shift": DEFAULTS["shift"],
                **own,
            }
        if isinstance(settings["size"], list):
            settings["size"] = tuple(settings["size"])
        prompt = said if prompt is None else prompt
    if prompt is None:
        raise ValueError("--prompt is missing: say what to do (or give --like, a picture with a record)")
    settings |= {key: value for key in DEFAULTS if (value := getattr(args, key)) is not None}
    if settings["bfl"]:
        changed = [key for key in ("fit", "shift", "sampler") if settings[key] != DEFAULTS[key]]
        if changed:
            raise ValueError(
                f"--bfl fixes {', '.join(changed)}: leave out {', '.join('--' + c for c in changed)}"
            )
    shift = settings["shift"]
    if shift not in ("resolution", "none"):
        try:
            settings["shift"] = float(shift)
        except ValueError:
            raise ValueError(f"--shift is {shift!r}; give resolution, none or a number") from None
    return prompt, settings


def _load_mask(args: argparse.Namespace, pictures: list, settings: dict[str, Any]):
    """A mask picture as (1,1,H,W) in [0,1], of the first picture's size."""
    from .. import images

    if settings["size"] != "auto":
        raise ValueError("--mask keeps the picture's own size: leave --size at auto")
    mask = images.load_image(args.mask).image.mean(1, keepdim=True) / 2 + 0.5
    size, own = (tuple(reversed(image.shape[-2:])) for image in (mask, pictures[0].image))
    if size != own:
        raise ValueError(f"--mask {args.mask} is {size[0]}x{size[1]} and the picture {own[0]}x{own[1]}")
    return mask
