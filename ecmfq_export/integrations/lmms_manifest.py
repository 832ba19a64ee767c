"""What lmms-eval's registry asks this package's entry point ``lmms_eval.models`` for: which models it brings, and where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "ecmfq"
CLASS_PATH = "ecmfq_export.integrations.lmms_eval.EcmfqModel"


def manifest() -> ModelManifest:
    """One model, in lmms-eval's simple form; called by lmms-eval, so that it is installed."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=CLASS_PATH)
