"""The models this package knows, by their sizes and by what they were trained for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .models.autoencoder import AutoencoderParams
from .models.clip import ClipParams
from .models.t5 import T5Params
from .models.transformer import TransformerParams


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """A model's parts and how it wants to be used.

    Attributes:
        text_length: T5 tokens that prompts are padded to.
        default_steps: denoising steps.
        default_guidance: the embedded, distilled guidance.
        max_area: pixels of the pictures it was trained on; preferred sizes have about this area.
    """

    name: str
    transformer: TransformerParams = field(default_factory=TransformerParams)
    autoencoder: AutoencoderParams = field(default_factory=AutoencoderParams)
    t5: T5Params = field(default_factory=T5Params)
    clip: ClipParams = field(default_factory=ClipParams)
    text_length: int = 512
    default_steps: int = 28
    default_guidance: float = 2.5
    max_area: int = 1024 * 1024

    def __post_init__(self) -> None:
        pairs = (
            ("text", "the T5 encoder gives", self.t5.d_model, self.transformer.context_in_dim),
            ("pooled text", "the CLIP encoder gives", self.clip.hidden_size, self.transformer.vec_in_dim),
            (
                "latents",
                "the autoencoder packs into",
                4 * self.autoencoder.z_channels,
                self.transformer.in_channels,
            ),
        )
        for what, giver, given, wanted in pairs:
            if given != wanted:
                raise ValueError(
                    f"these parts of {self.name} do not belong together: {giver} {given} {what} channels, "
                    f"and the transformer takes {wanted}."
                )


KONTEXT_DEV = ModelPreset(name="FLUX.1-Kontext-dev")

KONTEXT_TINY = ModelPreset(
    name="kontext-tiny",
    transformer=TransformerParams(
        vec_in_dim=128,
        context_in_dim=192,
        hidden_size=256,
        num_heads=4,
        depth=2,
        depth_single_blocks=6,
        axes_dim=(8, 28, 28),
    ),
    autoencoder=AutoencoderParams(ch=16, ch_mult=(1, 2, 4, 8), num_res_blocks=1),
    t5=T5Params(vocab_size=802, d_model=192, d_kv=48, d_ff=512, num_layers=4, num_heads=4),
    clip=ClipParams(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=512,
        num_layers=2,
        num_heads=2,
        eos_token_id=999,
    ),
    text_length=48,
    max_area=128 * 128,
)

PRESETS = {preset.name: preset for preset in (KONTEXT_DEV, KONTEXT_TINY)}


def infer_preset(
    name: str,
    *,
    transformer: TransformerParams,
    autoencoder: AutoencoderParams,
    t5: T5Params,
    clip: ClipParams,
    text_length: int | None = None,
) -> ModelPreset:
    """The preset of loaded parts: their own sizes, and the habits of the known model they resemble.

    A transformer of less than half the published width is taken for one of kontext-tiny's kind.

    Args:
        text_length: T5 tokens; by default those of the known model, whatever a tokenizer's own files say.

    Raises:
        ValueError: the parts do not fit each other.
    """
    base = KONTEXT_TINY if 2 * transformer.hidden_size < KONTEXT_DEV.transformer.hidden_size else KONTEXT_DEV
    return replace(
        base,
        name=name,
        transformer=transformer,
        autoencoder=autoencoder,
        t5=t5,
        clip=clip,
        text_length=base.text_length if text_length is None else text_length,
    )
