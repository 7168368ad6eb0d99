"""Config classes: what they refuse and derive, that they survive JSON and YAML, and the documentation from them."""

from __future__ import annotations

import doctest
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import ClassVar, Literal, Union, get_args, get_origin

import pytest

from geta_hf import config as module
from geta_hf.config import (
    CONFIG_CLASSES,
    FIELD_PAGES,
    REGENERATE,
    SECTIONS,
    CompressionConfig,
    GETAConfig,
    above,
    document_attributes,
    field_table,
    read_config,
    sections_of,
    setting,
    settings_of,
)
from geta_hf.errors import GETAError
from geta_hf.methods.one_shot import OneShotConfig

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(autouse=True)
def own_registry(monkeypatch) -> None:
    """Forget the classes that a test declares."""
    monkeypatch.setattr(module, "CONFIG_CLASSES", dict(CONFIG_CLASSES))


def search_config() -> type[CompressionConfig]:
    """Declare the config class of another method."""

    @document_attributes
    @dataclass
    class SearchConfig(CompressionConfig):
        """The settings of a search."""

        method: ClassVar[str] = "hunt"
        bits: tuple[int, int] = (2, 8)
        exclude: list[str] = setting(["head"], "Layers not to search.", section="Selection")
        temperature: float = setting(1.0, "Softmax temperature.", above(0), section="Search")
        betas: tuple[float, float] = (0.9, 0.99)
        names: dict | None = None

    return SearchConfig


@pytest.mark.parametrize("name", ["geta_config.json", "geta.yaml"])
@pytest.mark.parametrize(
    "config",
    [
        GETAConfig(),
        GETAConfig(0.3, (3, 6), warmup="1.5 epochs", include=["query"]),
        GETAConfig(prune=["residual"], keep=["*.0.*"]),
        GETAConfig(target_bytes=10**7, activation_bits=(4, 8), bit_choices=[8, 4], min_kept=0.25, distill_logits=0.5),
        GETAConfig.paper(eta=0.9),
    ],
)
def test_saved_and_read_back_equal(tmp_path, name: str, config: GETAConfig) -> None:
    config.save(tmp_path / name)
    assert GETAConfig.load(tmp_path / name) == config
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_paper_is_the_papers_rules_and_defaults_are_ours() -> None:
    paper, ours = GETAConfig.paper(target_sparsity=0.3), GETAConfig()
    assert (paper.saliency, paper.forgetting, paper.bit_rule, paper.clipping) == ("hesso", "paper", "paper", "max")
    assert paper.learn_exponent and paper.learn_activation_exponent and paper.target_sparsity == 0.3
    assert not ours.learn_exponent and not ours.learn_activation_exponent
    assert (ours.target_sparsity, ours.wanted_mean_bits, paper.wanted_mean_bits) == (0.5, 6, None)
    assert (ours.saliency, ours.forgetting, ours.bit_rule, ours.clipping) == ("fisher", "uniform", "sensitivity", "mse")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": (8, 8)}, r"bits = \(8, 8\) must have b_u >= b_l \+ 1 in the paper's rules \(Algorithm 2, line 1\)"),
        ({"projection_periods": 5}, r"projection_periods = 5 must be in 1..4, from 1 to b_u - b_l"),
        ({"projection_periods": 3, "bits": (4, 6)}, r"projection_periods = 3 must be in 1..2"),
        ({"projection_periods": 0}, r"projection_periods = 0 must be in 1..4"),
        ({"initial_bits": 8}, r"b_r = 0 must be at least 1 .* = \(8 - 8\) / 4"),
        ({"initial_bits": 10}, "b_r = 0.5 must be at least 1"),
        ({"initial_bits": 8, "bit_reduction": 0.5}, "b_r = 0.5 must be at least 1"),
        ({"bit_reduction": 4.0}, r"b_u - B·b_r = 16 - 4 · 4.0 = 0.0 is below b_l = 4"),
    ],
)
def test_the_papers_rules_take_the_papers_bounds(changes: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        GETAConfig.paper(**changes)
    if "below b_l" not in message:
        assert GETAConfig(**changes)  # these are bounds of the paper's rules alone


def test_the_papers_rules_at_their_bounds() -> None:
    assert GETAConfig.paper(bits=(4, 5)).projection_periods == 1
    assert GETAConfig.paper(bits=(2, 8), projection_periods=6, initial_bits=14).reduction == 1
    assert GETAConfig.paper(bits=(4, 8), initial_bits=12).reduction == 1
    assert GETAConfig.paper(bits=(4, 8), initial_bits=11, projection_periods=3).reduction == 1
    assert GETAConfig.paper(bit_reduction=2.5, projection=0, joint=0).final_upper_bits == 6


def test_what_is_left_out_is_decided_here() -> None:
    assert GETAConfig(target_bops=0.1).target_sparsity is None is GETAConfig(target_bops=0.1).wanted_mean_bits
    assert GETAConfig(mean_bits=5).target_sparsity == 0.5 and GETAConfig(mean_bits=5).wanted_mean_bits == 5
    choices = GETAConfig(bits=(2, 8), bit_choices=[8, 4, 4])
    assert choices.widths == [4, 8] and choices.wanted_mean_bits == 6
    assert GETAConfig(bit_rule="ppsg").wanted_mean_bits is None and GETAConfig(bits=(4, 6)).widths == [4, 5, 6]


def test_tuples_and_numbers_written_as_text_are_taken() -> None:
    config = GETAConfig(bits=[4, 8], include=("query",), exclude=("key",))
    assert GETAConfig.from_dict(config.to_dict()) == config and config.exclude == ["key"]
    assert GETAConfig.from_dict({"epsilon": "1e-9"}).epsilon == 1e-9  # as YAML 1.1 reads it
    assert GETAConfig.from_dict({"warmup": "1e1 steps"}).warmup == "1e1 steps"  # a length may be text
    with pytest.raises(GETAError, match="saliency = '1e3' must be one of"):
        GETAConfig.from_dict({"saliency": "1e3"})
    with pytest.raises(GETAError, match="multiple_of = '4' must be an integer"):
        GETAConfig.from_dict({"multiple_of": "4"})


@pytest.mark.parametrize("kind", [CompressionConfig, *CONFIG_CLASSES.values()])
def test_types_say_what_is_accepted(kind: type[CompressionConfig]) -> None:
    """Of values as YAML and Python write them, those and no others that the annotation allows; checks narrow it."""
    samples = (
        None,
        True,
        3,
        0.5,
        "3",
        "name",
        "layer",
        "fisher",
        ["layer"],
        [4, 8],
        (4, 8),
        ["name"],
        ("name",),
        [0.5],
        (0.5,),
        [None],
        {"a": 1},
    )
    for name, one in settings_of(kind).items():
        unchecked = replace(one, check=None)
        accepted = [value for value in samples if unchecked.accepts(value)]
        assert accepted == [value for value in samples if allowed_by(one.hint, value)], name


def test_a_field_of_text_lists_its_values_unless_it_may_be_any() -> None:
    """So that editors and type checkers know them, and the checks read them from the annotation."""
    free = {"latency_table", "warmup", "projection", "joint", "search"}
    for kind in CONFIG_CLASSES.values():
        for name, one in settings_of(kind).items():
            arms = get_args(one.hint) if get_origin(one.hint) in (Union, UnionType) else (one.hint,)
            assert str not in arms or name in free, name
    assert settings_of(GETAConfig)["forgetting"].choices == ("uniform", "paper")
    assert settings_of(GETAConfig)["serve"].choices == ("llama.cpp", "vllm")
    assert settings_of(GETAConfig)["warmup"].choices == ()


def allowed_by(hint: object, value: object) -> bool:
    """Read an annotation as a type checker does, by which every int is a float, and no bool a number."""
    if get_origin(hint) in (Union, UnionType):
        return any(allowed_by(arm, value) for arm in get_args(hint))
    if get_origin(hint) is Literal:
        return type(value) is str and value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(allowed_by(get_args(hint)[0], item) for item in value)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        kinds = kinds[:1] * len(value) if Ellipsis in kinds and isinstance(value, tuple) else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(allowed_by, kinds, value))
    return type(value) in ((int, float) if hint is float else (hint,))


def test_a_pair_has_two_widths_as_a_list_too() -> None:
    assert GETAConfig(bits=[4, 8]).bits == (4, 8) and OneShotConfig(bits=[2, 4]).bits == (2, 4)
    for pair in ([4], [4, 6, 8], []):
        with pytest.raises(GETAError, match=r"bits = .* must be a pair"):
            GETAConfig(bits=pair)
        with pytest.raises(GETAError, match=r"activation_bits = .* must be a pair"):
            GETAConfig(activation_bits=pair)
    assert settings_of(GETAConfig)["bit_choices"].allowed == "a list of integers"


def test_the_bounds_of_a_closed_range_are_allowed() -> None:
    lowest = GETAConfig(0, (2, 2), saliency_decay=0, epsilon=0, distill_logits=0, multiple_of=1, embedding_bits=2)
    assert (lowest.target_sparsity, lowest.bits, lowest.epsilon, lowest.embedding_bits) == (0, (2, 2), 0, 2)
    highest = GETAConfig(bits=(16, 16), initial_bits=16, embedding_bits=8, min_kept=1.0)
    assert (highest.bits, highest.embedding_bits, highest.min_kept) == ((16, 16), 8, 1)


def test_the_reduction_ends_at_the_upper_bits() -> None:
    assert GETAConfig(bits=(4, 8)).reduction == 2 and GETAConfig(bits=(4, 8)).final_upper_bits == 8
    given = GETAConfig(bits=(4, 8), bit_reduction=2.5)
    assert given.reduction == 2.5 and given.final_upper_bits == 6
    assert GETAConfig(projection_periods=0).final_upper_bits == 8
    assert GETAConfig(projection_periods=0, bit_reduction=1.0).final_upper_bits == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": (8, 4)}, r"bits = \(8, 4\) must be .*b_l <= b_u"),
        ({"bits": (1, 8)}, "2..16"),
        ({"bits": (4, 8, 9)}, "pair"),
        ({"bits": (4, 8), "initial_bits": 6}, "initial_bits = 6"),
        ({"bits": (4, 8), "bit_reduction": 4}, r"b_u - B·b_r = 16 - 4 · 4 = 0 is below b_l = 4"),
        ({"bits": (4, 8), "bit_reduction": 1}, "= 12 is above the 8 bits of `bits`"),
        ({"bit_choices": [8], "bit_reduction": 2.5}, r"= 6\.0 is below all of bit_choices = \[8\]"),
        ({"bit_choices": [2, 4]}, r"bit_choices = \[2, 4\] must be widths in 4..8"),
        ({"bit_choices": []}, "bit_choices"),
        ({"bit_choices": [4.0]}, "bit_choices = .* a list of integers"),
        ({"mean_bits": 9}, r"mean_bits = 9 must be in 4..8"),
        ({"mean_bits": 4, "bit_choices": [5, 6]}, r"mean_bits = 4 must be in 5..6, as `bit_choices`"),
        ({"activation_bits": (8, 20)}, r"activation_bits = \(8, 20\) must be a pair .* in 2..16"),
        ({"activation_bits": (8, 4)}, "activation_bits"),
        ({"per_channel": True, "bit_rule": "paper"}, "Eq. 14 sets one d a layer"),
        ({"grid": "block32", "bit_rule": "paper"}, "Eq. 14 sets one d a layer"),
        ({"grid": "block64"}, "grid = 'block64' must be one of layer, channel, block32"),
        ({"target_sparsity": 0.5, "target_parameters": 0.5}, "target_sparsity and target_parameters set the same"),
        (
            {"target_bops": 0.1, "target_bytes": 10**6},
            "target_bops and target_bytes set the same target; give only one",
        ),
        ({"target_sparsity": 0.5, "target_bops": 0.1, "mean_bits": 5}, "can't all be met; give two of them"),
        ({"target_bops": 1.5}, r"target_bops = 1.5 must be a number in \(0, 1\)"),
        ({"target_bops": 0}, r"target_bops = 0 must be a number in \(0, 1\)"),
        ({"target_bytes": 1.5e6}, "target_bytes = 1500000.0 must be an integer"),
        ({"min_kept": 0}, "min_kept"),
        ({"min_kept": 2.5}, "min_kept = 2.5 must be an integer count of at least 1, or a share"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"uniform": 1}, "uniform = 1 must be a bool"),
        ({"distill_logits": -1}, "distill_logits"),
        ({"distill_temperature": 0}, "distill_temperature = 0 must be a number above 0"),
        ({"target_sparsity": 1.0}, r"target_sparsity = 1.0 must be a number in \[0, 1\)"),
        ({"target_sparsity": -0.1}, "target_sparsity"),
        ({"saliency": "magic"}, "saliency = 'magic' must be one of fisher, taylor, hesso"),
        ({"pruning_periods": -1}, "pruning_periods = -1 must be an integer of at least 0"),
        ({"projection_periods": -1}, "projection_periods"),
        ({"warmup": -1}, "warmup = -1 must be steps, .*; not negative"),
        ({"projection": -0.5}, "projection = -0.5 must be steps, .*; not negative"),
        ({"joint": "-1 epochs"}, "joint = '-1 epochs' must be steps, .*; not negative"),
        ({"joint": "soon"}, "joint = 'soon' must be steps, a share of training, or text such as '1.5 epochs'"),
        ({"warmup": 1.0}, "warmup = 1.0 must be steps, .* a share below 1"),
        ({"eta": 1.0}, "eta"),
        ({"eta": "abc"}, "eta = 'abc' must be a number"),
        ({"target_sparsity": "half"}, "target_sparsity = 'half' must be a number"),
        ({"bits": 8}, "bits = 8 must be a pair"),
        ({"bits": None}, "bits = None must be a pair"),
        ({"projection_periods": "4"}, "projection_periods = '4' must be an integer"),
        ({"pruning_periods": 4.0}, "pruning_periods = 4.0 must be an integer"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"exclude": "pooler"}, "exclude = 'pooler' must be a list"),
        ({"include": [1]}, "include"),
        ({"prune": "residual"}, "prune = 'residual' must be a list of kinds"),
        ({"keep": [None]}, "keep"),
        ({"initial_bits": 20}, "initial_bits = 20 must be an integer from b_u to 16"),
        ({"activation_bits": (4, 8), "initial_bits": 6, "bits": (4, 6)}, r"activation_bits = \(4, 8\) must be .* <= 6"),
        ({"embedding_bits": 9}, "embedding_bits = 9 must be an integer in 2..8"),
        ({"embedding_bits": True}, "embedding_bits = True must be an integer"),
        ({"calibration_batches": 0}, "calibration_batches = 0 must be an integer of at least 1"),
        ({"distill_hidden": float("inf")}, "distill_hidden = inf must be a number"),
        ({"saliency_decay": 1}, "saliency_decay"),
        ({"bit_rule": ["paper"]}, "bit_rule = .* must be one of sensitivity, ppsg, paper"),
        ({"drop_layers": -1}, "drop_layers = -1 must be a number of layers"),
        ({"warmup": None}, "warmup = None must be steps, a share of training, or text"),
        ({"joint": True}, "joint = True must be steps, a share of training, or text"),
    ],
)
def test_what_cannot_be_met_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        GETAConfig(**changes)


def test_unreadable_and_foreign_files_are_refused(tmp_path) -> None:
    with pytest.raises(GETAError, match="can't be read"):
        GETAConfig.load(tmp_path / "missing.json")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(GETAError, match="holds list"):
        GETAConfig.load(tmp_path / "list.yaml")
    with pytest.raises(GETAError, match="holds list"):
        read_config(tmp_path / "list.yaml")
    (tmp_path / "torn.json").write_text('{"bits": [4,')
    with pytest.raises(GETAError, match="can't be read"):
        GETAConfig.load(tmp_path / "torn.json")
    with pytest.raises(GETAError, match=r"unknown GETAConfig keys \['sparsity'\]"):
        GETAConfig.from_dict({"sparsity": 0.5})


# --- the limits that every method shares, and other methods -----------------------------------------------------------


def test_the_shared_limits_need_no_stages() -> None:
    limits = CompressionConfig(0.5, (3, 6), activation_bits=(8, 16))
    assert not hasattr(limits, "initial_bits") and limits.final_upper_bits == 6
    assert limits.widths == [3, 4, 5, 6] and limits.wanted_mean_bits == 4.5
    assert CompressionConfig(target_bytes=10**6).wanted_mean_bits is None
    with pytest.raises(GETAError, match=r"CompressionConfig.mean_bits = 9 must be in 4..8, as `bits`"):
        CompressionConfig(mean_bits=9)
    with pytest.raises(GETAError, match="can't all be met"):
        CompressionConfig(target_parameters=0.5, target_bytes=10**6, mean_bits=5)


def test_every_shared_limit_is_a_setting_of_geta_in_the_same_place() -> None:
    shared, own = list(settings_of(CompressionConfig)), list(settings_of(GETAConfig))
    assert own[: len(shared)] == shared and len(own) > len(shared)
    config = GETAConfig(0.3, (3, 6))
    assert isinstance(config, CompressionConfig) and (config.target_sparsity, config.bits) == (0.3, (3, 6))


@pytest.mark.parametrize("name", ["geta_config.json", "geta.yaml"])
def test_a_method_enters_with_its_config_class(tmp_path, name: str) -> None:
    kind = search_config()
    config = kind(target_bops=0.1, temperature=0.5)
    config.save(tmp_path / name)
    read = read_config(tmp_path / name)
    assert type(read) is kind and read == config and read.to_dict()["method"] == "hunt"
    assert read_config(read.to_dict()) == config and read_config(GETAConfig().to_dict()) == GETAConfig()
    assert kind.load(tmp_path / name) == config
    with pytest.raises(GETAError, match=r"SearchConfig.temperature = 0 must be a number above 0"):
        read_config({"method": "hunt", "temperature": 0})
    with pytest.raises(GETAError, match=r"unknown SearchConfig keys \['warmup'\]"):
        read_config({"method": "hunt", "warmup": 0.1})


def test_a_subclass_changes_defaults_and_keeps_the_rest() -> None:
    kind = search_config()
    assert kind().bits == (2, 8) and kind(target_sparsity=0.3).widths[0] == 2
    mine, shared = settings_of(kind)["bits"], settings_of(CompressionConfig)["bits"]
    assert (mine.help, mine.allowed, mine.section) == (shared.help, shared.allowed, shared.section)
    with pytest.raises(GETAError, match=r"SearchConfig.bits = \(1, 8\) must be a pair"):
        kind(bits=(1, 8))
    first, second = kind(), kind()
    first.exclude.append("pooler")
    assert second.exclude == ["head"]


def test_types_without_a_description_are_checked_too() -> None:
    kind = search_config()
    for changes, message in [({"betas": [0.9]}, "a list of 2 numbers"), ({"names": [1]}, "a dict")]:
        with pytest.raises(GETAError, match=message):
            kind(**changes)
    assert kind(betas=[0.5, 1]).betas == (0.5, 1) and kind(names={}).names == {}


def test_a_method_has_one_class() -> None:
    class Same(GETAConfig):
        """Has the method of its base, and is not registered."""

    assert module.CONFIG_CLASSES["qasso"] is GETAConfig and Same.method == "qasso"
    with pytest.raises(GETAError, match="method 'qasso' of Other already belongs to GETAConfig"):

        class Other(CompressionConfig):
            method = "qasso"


def test_the_method_chooses_the_class_that_reads() -> None:
    kind = search_config()
    for method in ("sparse", None, ["qasso"]):
        with pytest.raises(GETAError, match=r"unknown method .*; known are \[.*'hunt', .*'qasso'.*\]"):
            read_config({"method": method})
    with pytest.raises(
        GETAError, match=r"GETAConfig has method 'qasso', not 'hunt'; read the values with .*read_config"
    ):
        GETAConfig.from_dict(kind().to_dict())


def test_a_file_from_before_methods_is_read_as_qasso(tmp_path) -> None:
    old = {
        "target_sparsity": 0.3,
        "bits": [4, 8],
        "target_parameters": None,
        "mean_bits": None,
        "bit_choices": None,
        "activation_bits": [4, 8],
        "min_kept": 1,
        "initial_bits": 16,
        "bit_reduction": None,
        "warmup": "1.5 epochs",
        "saliency": "hesso",
        "clipping": "max",
        "epsilon": 1e-08,
        "include": ["query"],
        "exclude": [],
        "drop_layers": ["model.layers.3"],
    }
    (tmp_path / "geta_config.json").write_text(json.dumps(old))
    expected = GETAConfig(
        0.3,
        activation_bits=(4, 8),
        warmup="1.5 epochs",
        saliency="hesso",
        clipping="max",
        include=["query"],
        drop_layers=["model.layers.3"],
    )
    assert GETAConfig.load(tmp_path / "geta_config.json") == expected == read_config(tmp_path / "geta_config.json")
    assert type(read_config(old)) is GETAConfig


def test_lists_and_tuples_become_what_the_field_has() -> None:
    config = GETAConfig(drop_layers=("model.layers.1",), activation_bits=[4, 8], keep=("a",))  # type: ignore[arg-type]
    assert (config.drop_layers, config.activation_bits, config.keep) == (["model.layers.1"], (4, 8), ["a"])


# --- documentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CompressionConfig, GETAConfig])
def test_every_setting_is_described_where_it_is_declared(kind: type[CompressionConfig]) -> None:
    for name, one in settings_of(kind).items():
        assert one.help.endswith("."), f"{kind.__name__}.{name} needs a sentence of help"
        assert one.section in SECTIONS and one.allowed, name
        assert one.accepts(one.default), name
        assert f"{name}: " in kind.__doc__.partition("Attributes:")[2], f"help({kind.__name__}) lacks {name}"


@pytest.mark.parametrize("method", FIELD_PAGES)
def test_the_pages_of_the_docs_are_what_the_declarations_say(method: str) -> None:
    page = DOCS / FIELD_PAGES[method]
    assert page.read_text(encoding="utf-8") == field_table(CONFIG_CLASSES[method]), f"outdated; run {REGENERATE}"


def test_the_table_covers_other_methods() -> None:
    page = field_table(search_config())
    assert "| `temperature` | `1.0` | a number above 0 | Softmax temperature. |" in page and "## Search" in page
    assert "| `bits` | `(2, 8)` | a pair (b_l, b_u) of integers in 2..16" in page and "warmup" not in page
    assert "max\\|W\\|" in page and list(sections_of(GETAConfig)) == list(SECTIONS)


def test_the_examples_in_the_docstrings_hold() -> None:
    results = doctest.testmod(module)
    assert results.attempted >= 5 and not results.failed


def test_a_grid_has_a_former_spelling() -> None:
    channel, block = GETAConfig(per_channel=True), GETAConfig(grid="block32")
    assert (GETAConfig().grid, channel.grid, OneShotConfig().grid) == ("layer", "channel", "channel")
    assert OneShotConfig(per_channel=False).grid == "layer" and GETAConfig(grid="channel").per_channel
    # Files without blocks are as they were before there were any.
    assert "grid" not in channel.to_dict() and block.to_dict()["grid"] == "block32"
    for config in (GETAConfig(), channel, block, OneShotConfig(grid="block32"), OneShotConfig(grid="layer")):
        assert read_config(json.loads(json.dumps(config.to_dict()))) == config
    # Copies with another value of either.
    copies = [replace(channel, grid="layer"), replace(block, per_channel=True), replace(channel, grid="block32")]
    copies += [replace(channel, per_channel=False), replace(block, bits=(2, 4)), replace(channel, bits=(2, 4))]
    assert [copy.grid for copy in copies] == ["layer", "channel", "block32", "layer", "block32", "channel"]
    assert [copy.per_channel for copy in copies] == [False, True, False, False, False, True]
