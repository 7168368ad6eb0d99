"""The page shows the graph and the space exactly, needs nothing else, and is written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from geta_hf.errors import GETAError
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.space import PruningSpace, space_of
from geta_hf.reporting.graph_page import gather, page_data, pattern, span, write_page
from tests.architectures import build
from tests.qadg.models import Block, PlainQuantizer, make, quantize_linears


def studied(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[Flow, PruningSpace]:
    flow = record_and_propagate(model.eval(), batch)
    return flow, space_of(flow)


def tiny_llama(layers: int = 2) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model, {"input_ids": torch.arange(16).reshape(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


@pytest.fixture
def llama() -> tuple[Flow, PruningSpace]:
    return studied(*tiny_llama())


def embedded(path: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize(
    ("name", "stars"),
    [
        ("model.layers.31.mlp:channels", "model.layers.*.mlp:channels"),
        ("h.0.attn:heads#2", "h.*.attn:heads#*"),
        ("stages.1.layers.2", "stages.*.layers.*"),
        ("conv1.w2v2.0x:other", "conv1.w2v2.0x:other"),
        ("7", "*"),
        ("", ""),
    ],
)
def test_pattern_stars_whole_numbers_only(name: str, stars: str) -> None:
    assert pattern(name) == stars


def test_span_names_every_number_once() -> None:
    assert span([f"a.{i}.b.1:x" for i in (2, 0, 1)]) == "a.{0..2}.b.1:x"
    assert span(["a.0:x", "a.2:x"]) == "a.{0,2}:x"
    assert span(["a.7:x"]) == "a.7:x"
    assert span([]) == ""
    assert gather(["a.0", "b", "a.1", "c.3"]) == ["a.{0..1}", "b", "c.3"]


def test_vertices_are_the_nodes_and_edges_are_who_reads_whom(llama: tuple[Flow, PruningSpace]) -> None:
    flow, space = llama
    nodes, data = flow.graph.nodes, page_data(flow, space, "t")
    assert [(v["op"], v["module"]) for v in data["vertices"]] == [(n.op, n.module) for n in nodes]
    assert [[out[0] for out in v["outputs"]] for v in data["vertices"]] == [list(n.outputs) for n in nodes]
    shapes = {value: shape for v in data["vertices"] for value, shape, _ in v["outputs"]}
    assert all(shapes[value] == list(flow.graph.values[value].shape) for value in shapes)
    made = {value: position for position, node in enumerate(nodes) for value in node.outputs}
    expected = {(ref, made[ref], p) for p, node in enumerate(nodes) for ref in node.refs() if ref in made}
    assert {tuple(edge) for edge in data["edges"]} == expected
    assert len(data["edges"]) == len(expected)
    assert [v["returned"] for v in data["vertices"]].count(True) == len(set(flow.graph.outputs))


def test_families_are_those_of_the_space(llama: tuple[Flow, PruningSpace]) -> None:
    flow, space = llama
    shown = page_data(flow, space, "t")["families"]
    assert len(shown) == len(space.families)
    for family, drawn in zip(space.families, shown, strict=True):
        assert (drawn["name"], drawn["kind"], drawn["groups"]) == (family.name, family.kind, family.size)
        assert (drawn["prunable"], drawn["reason"]) == (family.prunable, family.reason)
        assert (drawn["parameters"], drawn["macs"]) == (family.parameters, family.macs)
        assert [(m["tensor"], m["dim"], m["width"]) for m in drawn["members"]] == [
            (m.tensor, m.dim, m.index.shape[1]) for m in family.members
        ]
        for member, row in (
            (m, row) for m, d in zip(family.members, drawn["members"], strict=True) for row in d["rows"]
        ):
            assert row in [whole[: len(row)] for whole in member.index.tolist()]
    legends = {family["legend"] for family in shown}
    assert {"model.layers.{0..1}.mlp:channels", "model.layers.{0..1}.self_attn:heads"} <= legends


@pytest.mark.parametrize("name", ["bert", "albert", "t5", "llama", "moonshine", "mixtral", "resnet", "radio"])
def test_every_tensor_shows_exactly_the_families_that_cut_it(name: str) -> None:
    flow, space = studied(*build(name))
    cut: dict[tuple[str, int], set[int]] = {}
    for position, family in enumerate(space.families):
        for member in family.members:
            cut.setdefault((member.tensor, member.dim), set()).add(position)
    seen = set()
    data = page_data(flow, space, "t")
    for vertex in data["vertices"]:
        for _, shape, dims, *names in vertex["reads"]:
            assert len(dims) == len(shape)
            for dim, families in enumerate(dims):
                assert set(families) == cut.get((names[0], dim), set()), (names, dim)
            seen.update((names[0], dim) for dim in range(len(dims)))
    assert set(cut) <= seen
    assert all(start < end for _, start, end in data["edges"])


def test_a_vertex_has_the_families_of_its_results() -> None:
    flow, space = studied(make("bert-qa"), {"input_ids": torch.arange(16).reshape(2, 8)})
    data = page_data(flow, space, "t")
    names = [family["name"] for family in data["families"]]
    [layer] = [v for v in data["vertices"] if v["op"] == "addmm" and v["module"].endswith("layer.1.intermediate.dense")]
    assert [names[family] for family in layer["families"]] == ["bert.encoder.layer.1:channels"]
    [[_, shape, dims]] = layer["outputs"]
    assert shape == [16, 24]
    assert dims == [[], layer["families"]]


def test_merged_quantizers_are_one_vertex_in_their_layer() -> None:
    model = quantize_linears(make("bert-qa"), PlainQuantizer, activations=True)
    data = page_data(*studied(model, {"input_ids": torch.arange(16).reshape(2, 8)}), "t")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for op in ("attached", "inserted"):
        merged = [v for v in data["vertices"] if v["op"] == op]
        assert sorted(v["block"] for v in merged) == sorted(linears)
        assert all({"abs", "round", "mul"} <= set(v["body"]) for v in merged)


def test_frozen_operators_are_marked_with_the_reason() -> None:
    block = Block(lambda x: torch.fft.fft(x).real)
    flow, space = studied(nn.Sequential(block), {"input": torch.randn(2, 6)})
    data = page_data(flow, space, "t")
    [frozen] = space.unsupported
    assert data["frozen"] == [
        {"op": frozen.operator, "module": "0", "modules": "0", "reason": frozen.reason, "count": 1}
    ]
    assert [v["op"] for v in data["vertices"] if v["frozen"]] == [frozen.operator]
    assert next(v for v in data["vertices"] if v["frozen"])["frozen"] == frozen.reason


def test_edges_run_forwards_where_operators_write_in_place() -> None:
    flow, space = studied(nn.Sequential(Block(lambda x: x.relu_().mul_(2))), {"input": torch.randn(2, 6)})
    data = page_data(flow, space, "t")
    assert all(start < end for _, start, end in data["edges"])
    names = [vertex["op"] for vertex in data["vertices"]]
    made_by = {(names[start], names[end]) for _, start, end in data["edges"]}
    assert {("addmm", "relu_"), ("relu_", "mul_")} <= made_by
    assert any(start == "mul_" for start, _ in made_by)


HOSTILE = "</script><img src=x onerror=alert(1)><!--{{script}} & \u2028\ud800"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(HOSTILE, Block(torch.relu))
    flow, space = studied(model, {"input": torch.randn(2, 6)})
    page = tmp_path / "page.html"
    write_page(flow, space, page, f"</title>{HOSTILE}{{{{data}}}}")
    text = page.read_text()
    assert embedded(page) == json.loads(json.dumps(page_data(flow, space, f"</title>{HOSTILE}{{{{data}}}}")))
    assert HOSTILE in {vertex["module"] for vertex in embedded(page)["vertices"]}
    assert text.count("<script") == text.count("</script>") == 2
    assert text.count("</title>") == 1
    assert "<img" not in text
    assert "<!--" not in text


def test_the_page_needs_nothing_else(tmp_path: Path, llama: tuple[Flow, PruningSpace]) -> None:
    write_page(*llama, tmp_path / "page.html", "tiny")
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|\bsrc\s*=|\bhref\s*=|url\(|@import|\bimport\s|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text
    assert "<title>tiny</title>" in text
    assert "innerHTML" not in text


def test_a_page_is_replaced_whole_or_not_at_all(
    tmp_path: Path, llama: tuple[Flow, PruningSpace], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is gone"):
        patch.setattr(os, "replace", fail)
        write_page(*llama, page, "t")
    assert page.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]
    write_page(*llama, page, "t")
    assert page.read_text().startswith("<!doctype html>")
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_page_needs_a_folder(tmp_path: Path, llama: tuple[Flow, PruningSpace]) -> None:
    with pytest.raises(GETAError, match="folder that exists"):
        write_page(*llama, tmp_path / "no" / "page.html", "t")
    with pytest.raises(GETAError, match="folder that exists"):
        write_page(*llama, tmp_path, "t")


def test_thirty_two_layers_stay_small(tmp_path: Path) -> None:
    flow, space = studied(*tiny_llama(layers=32))
    page = tmp_path / "page.html"
    write_page(flow, space, page, "32 layers")
    data = embedded(page)
    assert len(data["vertices"]) == len(flow.graph.nodes) > 2500
    assert page.stat().st_size < 2_000_000
    assert "model.layers.{0..31}.mlp:channels" in {family["legend"] for family in data["families"]}
