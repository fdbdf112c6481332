"""config.json of the text encoders, with the names that transformers writes and `weights.load` reads.

Source: huggingface/transformers `T5Config`, `CLIPTextConfig`.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..models.clip import ClipParams
from ..models.t5 import T5Params


def write_text_configs(folder: Path, t5: T5Params, clip: ClipParams) -> None:
    """Write text_encoder/ and text_encoder_2/config.json into a model folder that has both folders.

    Raises:
        OSError: a folder is missing or cannot be written.
    """
    (folder / "text_encoder_2" / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["T5EncoderModel"],
                "model_type": "t5",
                "vocab_size": t5.vocab_size,
                "d_model": t5.d_model,
                "d_kv": t5.d_kv,
                "d_ff": t5.d_ff,
                "num_layers": t5.num_layers,
                "num_heads": t5.num_heads,
                "relative_attention_num_buckets": t5.relative_attention_num_buckets,
                "relative_attention_max_distance": t5.relative_attention_max_distance,
                "layer_norm_epsilon": t5.eps,
                "feed_forward_proj": "gated-gelu",
                "is_gated_act": True,
                "dense_act_fn": "gelu_new",
            },
            indent=1,
        )
    )
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["CLIPTextModel"],
                "model_type": "clip_text_model",
                "vocab_size": clip.vocab_size,
                "hidden_size": clip.hidden_size,
                "intermediate_size": clip.intermediate_size,
                "num_hidden_layers": clip.num_layers,
                "num_attention_heads": clip.num_heads,
                "max_position_embeddings": clip.max_length,
                "hidden_act": "quick_gelu",
                "eos_token_id": clip.eos_token_id,
                "bos_token_id": clip.eos_token_id - 1,
            },
            indent=1,
        )
    )
