"""What is known of each family beyond its spec: published checkpoints, what was compared with what, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_PYTORCH = "PyTorch reference against transformers 5.23: embeddings, every layer, routing, logits; float32 and float64"
_GRAPHS = "both graphs in ONNX Runtime against {theirs}, prefill and decode steps, both attention forms"
_INTEGERS = "quantized graph in ONNX Runtime against PyTorch's integers, layer by layer"
_WHOLE = "calibrate, smooth, quantize, export, TensorRT-RTX engine with the plugin's nodes, report, generation"
_THEIRS = _GRAPHS.format(theirs="transformers' own forward, from pixels to logits")
_OURS = _GRAPHS.format(theirs="the PyTorch reference")

_VIDEO = "video: a prompt with the video placeholder"
_ROPE = "scaled rotary embedding (YaRN, linear, dynamic)"
_SLIDING = "sliding-window attention"


@dataclass(frozen=True)
class FamilyFacts:
    """One row of docs/families.md.

    Attributes:
        title: the family's usual name.
        checkpoints: published ones of this ``model_type``.
        attention, experts, vision: what the model is made of.
        compared: what tests compare, and with what; always on small random models made by transformers' classes.
        headers: the published checkpoint whose config, tensor names and shapes are checked without its weights; empty for none.
        refused: what is refused by name before any work.
        left_out: parts of a checkpoint that are neither run nor exported.
        note: what else a user should know.
    """

    title: str
    checkpoints: tuple[str, ...]
    attention: str
    experts: str
    vision: str
    compared: tuple[str, ...]
    refused: tuple[str, ...]
    headers: str = ""
    left_out: str = ""
    note: str = ""


_QWEN_VISION = "Qwen3-VL tower, bilinear position table, DeepStack"
_KIMI = {
    "attention": "latent (MLA), keys and values expanded; plain rotary embedding",
    "experts": "sigmoid, selection bias, groups, scaling, shared experts",
    "vision": "MoonViT, bicubic position table",
    "compared": (_PYTORCH, _OURS, _INTEGERS, _WHOLE),
}

FACTS: Mapping[str, FamilyFacts] = {
    "qwen3_vl_moe": FamilyFacts(
        "Qwen3-VL-MoE", ("Qwen3-VL-30B-A3B", "Qwen3-VL-235B-A22B"),
        "grouped-query, norms of queries and keys; interleaved MRoPE", "softmax, renormalized", _QWEN_VISION,
        (_PYTORCH, _THEIRS, _INTEGERS, _WHOLE + "; also on the trained example"), (_VIDEO, _ROPE, _SLIDING), "Qwen3-VL-235B-A22B-Instruct",
        note="experts whose transposed form cannot be told by shape are refused",
    ),
    "qwen3_omni_moe": FamilyFacts(
        "Qwen3-Omni-MoE", ("Qwen3-Omni-30B-A3B-Instruct", "-Thinking", "-Captioner"),
        "grouped-query, norms of queries and keys; interleaved MRoPE", "softmax, renormalized or not", _QWEN_VISION,
        (_PYTORCH, _THEIRS, _INTEGERS, _WHOLE), (_VIDEO, "audio: a prompt with the audio placeholder", _ROPE, _SLIDING),
        "Qwen3-Omni-30B-A3B-Instruct",
        left_out="audio tower, talker and waveform decoder: named at each stage, copied unchanged into the quantized checkpoint "
                 "(not into a rotated one), absent from the graphs",
        note="text and images of the thinker",
    ),
    "qwen3_omni_moe_thinker": FamilyFacts(
        "Qwen3-Omni-MoE, a thinker saved by itself", (), "as above", "as above", "as above", (_PYTORCH,),
        (_VIDEO, "audio: a prompt with the audio placeholder", _ROPE, _SLIDING), left_out="audio tower, in the same way",
        note="the form that transformers saves of the thinker's class; every later step reads the same spec as the full form",
    ),
    "glm4v_moe": FamilyFacts(
        "GLM-4.5V", ("GLM-4.5V", "GLM-4.6V"), "grouped-query with biases; MRoPE in sections, part of a head rotated",
        "sigmoid, selection bias, groups, scaling, shared experts", "GLM-4.1V tower, bicubic position table",
        (_PYTORCH, _THEIRS, _INTEGERS, _WHOLE), (_VIDEO, _ROPE, "norms of queries and keys (use_qk_norm)"), "GLM-4.5V",
    ),
    "ernie4_5_vl_moe": FamilyFacts(
        "ERNIE-4.5-VL-MoE", ("ERNIE-4.5-VL-28B-A3B-PT in transformers 5's form",),
        "grouped-query; rotary pairs, MRoPE of alternating rows and columns",
        "text tokens and image tokens have routers and experts of their own: softmax, selection bias, renormalized; shared experts",
        "axial rotary tower without a position table, resampler", (_PYTORCH, _THEIRS, _INTEGERS, _WHOLE),
        (_VIDEO, _ROPE, "biases of projections and experts (use_bias)", "rotation of the residual stream (rotate), since the resampler "
         "ends in a norm"), "ERNIE-4.5-VL-28B-A3B-PT",
        note="one plugin node a layer holds the experts of both types: a text expert, wider than an image expert, is cut into pieces of "
             "the common width, each in a slot of its own; slots that an image token leaves empty cost the plugin nothing; needs "
             "transformers 5's config.json and a tokenizer.json (the published ones are remote code's and SentencePiece's)",
    ),
    "aria": FamilyFacts(
        "Aria", ("Aria in transformers' form",), "grouped-query, with or without biases; plain rotary embedding",
        "softmax over the selected, shared experts", "Idefics3 tower, one table entry a patch, projector of learned queries",
        (_PYTORCH, _THEIRS, _INTEGERS, _WHOLE),
        (_ROPE, "biases of experts (mlp_bias)", "crops of an image (split_image)", "another layer's features (vision_feature_layer)",
         "weights that other quantizers rounded"),
        "Aria",
        left_out="norm behind the vision tower, whose features are taken in front of it: copied unchanged into the quantized checkpoint",
        note="an image is as many tokens as queries read its canvas (128 of 490 pixels, 256 of 980); patches of the canvas that the image "
             "leaves free, which transformers masks, are not computed; the vision graph takes the largest canvas (4900 patches) at least",
    ),
    "internvl": FamilyFacts(
        "InternVL3.5, mixture-of-experts", ("InternVL3_5-30B-A3B-HF", "InternVL3_5-241B-A28B-HF"),
        "grouped-query, norms of queries and keys; plain rotary embedding", "softmax, renormalized or not",
        "InternViT over tiles with a class token each, merged patches", (_PYTORCH, _THEIRS, _INTEGERS, _WHOLE),
        ("video (no placeholder is named by the config)", _ROPE, _SLIDING, "decoders other than Qwen3-MoE (text_config.model_type)"),
        "InternVL3_5-30B-A3B-HF",
        note="the form that transformers keeps (-HF); an image is cut into tiles as InternVL's processor has it, and each tile is a call "
             "of the vision graph, whose attention is quadratic in its patches",
    ),
    "kimi_vl": FamilyFacts(
        "Kimi-VL", ("Kimi-VL-A3B-Instruct", "Kimi-VL-A3B-Thinking"), **_KIMI, refused=(_ROPE,), headers="Kimi-VL-A3B-Instruct",
        note="needs a tokenizer.json (the published tokenizer is a tiktoken file)",
    ),
    "kimi_k25": FamilyFacts(
        "Kimi-VL as transformers' Kimi-K2.5 classes keep it", (), **_KIMI, refused=(_VIDEO, _ROPE),
        note="save_pretrained(..., save_original_format=False) of Kimi_K25ForConditionalGeneration",
    ),
}  # fmt: skip
"""By ``model_type``, in the order of the page."""

_DENSE = "its decoder is dense: there are no routed experts"
_TEXT = "a text model: there is no vision tower"

REFUSED: Mapping[str, str] = {
    "ernie4_5_moe_vl": "the remote code's config.json of ERNIE-4.5-VL; the tensors are those of ernie4_5_vl_moe, which is the config.json "
                       "that transformers 5 makes of it",
    "gemma4": "window and full attention layers with rotary embeddings of their own, norms around every part, tanh-GELU experts",
    "qwen3_5_moe": "most layers have linear attention with a recurrent state",
    "llama4": "chunked attention, and router weights that scale the experts' inputs",
    "qwen3_vl": _DENSE,
    "qwen2_5_vl": _DENSE,
    "glm4v": _DENSE,
    "glm46v": _DENSE,
    "qwen3_moe": _TEXT,
    "glm4_moe": _TEXT,
    "deepseek_v3": _TEXT,
}
"""``model_type`` of models that are known and not supported, with the reason that a user is told."""
