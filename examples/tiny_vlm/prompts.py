"""Prompts and batches from a checkpoint directory, through transformers' own files.

transformers' Qwen3VLProcessor also wants a video processor, which needs torchvision; the tokenizer and the PIL image
processor are all that images need, and this joins them as that processor does.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer


class Prompter:
    """Chat prompts and model inputs, as any consumer of the checkpoint builds them."""

    def __init__(self, directory: Path | str):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.image_processor = AutoImageProcessor.from_pretrained(directory)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.merge = self.image_processor.merge_size**2

    def text(self, question: str, has_image: bool, image_tokens: int = 1, answer: str | None = None) -> str:
        """The chat text; with an `answer`, the whole exchange up to its <|im_end|>."""
        content = [{"type": "image"}] if has_image else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * image_tokens)
        return prompt if answer is None else prompt + answer + "<|im_end|>"

    def batch(self, questions: list[str], images: list[Image.Image | None], answers: list[str] | None = None) -> dict[str, torch.Tensor]:
        """Inputs of Qwen3VLMoeForConditionalGeneration for a left-padded batch."""
        present = [image for image in images if image is not None]
        vision = dict(self.image_processor(present, return_tensors="pt")) if present else {}
        counts = iter((vision["image_grid_thw"].prod(-1) // self.merge).tolist()) if present else iter(())
        texts = [
            self.text(q, im is not None, next(counts) if im is not None else 1, answers[i] if answers else None)
            for i, (q, im) in enumerate(zip(questions, images, strict=True))
        ]
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        ids = encoded.input_ids
        return {
            "input_ids": ids,
            "attention_mask": encoded.attention_mask,
            "mm_token_type_ids": (ids == self.image_token_id).long(),
            **vision,
        }
