"""Settings: known, typed, in range, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecmfq_export.config import ExportConfig, QuantConfig, build_config, load_toml, split_settings
from ecmfq_export.errors import UserError


def test_defaults_hold_their_own_checks() -> None:
    assert build_config(QuantConfig, {}, "t") == QuantConfig()
    assert build_config(ExportConfig, {}, "t") == ExportConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"atention": "w8a8"}, "unknown key 'atention'"),
        ({"attention": "w2a2"}, "attention = 'w2a2'"),
        ({"num_samples": 1}, "num_samples = 1 is out of range"),
        ({"num_samples": "8"}, "expected int"),
        ({"activation_order": 1}, "expected bool"),
        ({"smoothing": False}, "allowed: method, none"),
        ({"cross_strength": -0.5}, "out of range"),
        ({"method": "magic"}, "allowed: ecmfq, rtn"),
        ({"num_samples": True}, "expected int"),
        ({"fusion_lambda": 1.5}, "out of range"),
        ({"group_size": 64}, "group_size = 64"),
    ],
)
def test_bad_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_config(QuantConfig, values, "file.toml")
    assert message in str(caught.value)


def test_a_whole_number_serves_as_a_float() -> None:
    assert build_config(QuantConfig, {"fusion_lambda": 1}, "t").fusion_lambda == 1


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[quant]\nattention = "w4a8"\n[export]\nmax_batch = 2\n')
    assert load_toml(path) == ({"attention": "w4a8"}, {"max_batch": 2})
    path.write_text("[quantt]\n")
    with pytest.raises(UserError, match="unknown table 'quantt'"):
        load_toml(path)
    path.write_text("= 3")
    with pytest.raises(UserError, match="not valid TOML"):
        load_toml(path)
    with pytest.raises(UserError, match="no configuration file"):
        load_toml(tmp_path / "none.toml")


def test_split_settings() -> None:
    assert split_settings(["attention=w4a8", "num_samples=64", "max_batch=2", "activation_order=false"]) == (
        {"attention": "w4a8", "num_samples": 64, "activation_order": False}, {"max_batch": 2})
    with pytest.raises(UserError, match="unknown setting"):
        split_settings(["nothing=1"])
    with pytest.raises(UserError, match="unknown setting"):
        split_settings(["attention"])
