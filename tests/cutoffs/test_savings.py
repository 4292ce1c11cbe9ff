import pytest

from diagnostics.cutoffs.savings import Held, kv_bytes, predict_savings
from tests.support.runs import llama_8b_shape
from tests.support.tiny import tiny_model

TOY = {
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 4,
    "width": 8,
    "layer_parameters": [100, 100],
    "head_parameters": 50,
    "bytes_per_value": 2,
    "layer_types": ["full_attention", "full_attention"],
    "sliding_window": None,
}


def test_toy_by_hand():
    (savings,) = predict_savings(TOY, 1, lengths=[10])
    # Two operations per weight and token; 4 per head dimension and query-key pair, 10 tokens have 55; head: 100.
    full_layer = 2 * 100 * 10 + 4 * 2 * 4 * 55
    deep_layer = 2 * 100 * 2 + 4 * 2 * 4 * 3  # the anchor and the last prompt token
    assert savings.ttft_ratio == pytest.approx((full_layer + deep_layer + 100) / (2 * full_layer + 100), rel=1e-12)
    assert savings.speedup_ttft == pytest.approx(1 / savings.ttft_ratio)
    # Keys and values, one KV head of 4, 2 bytes: 16 bytes per position.
    assert (savings.kv_bytes, savings.kv_bytes_full) == (16 * (10 + 2), 16 * 20)
    assert savings.kv_ratio == pytest.approx(12 / 20)
    assert savings.tpot_ratio == pytest.approx((500 + 192) / (500 + 320))
    assert savings.within_positions


def test_llama_8b_at_cutoff_24_saves_what_the_paper_says():
    (savings,) = predict_savings(llama_8b_shape(), 24, lengths=[131072], max_positions=131072)
    assert savings.kv_ratio - 1 == pytest.approx(-0.25, abs=1e-4)
    assert savings.kv_bytes_full == 16 * 2**30
    assert savings.ttft_ratio == pytest.approx(0.75, abs=1e-3)
    assert savings.speedup_ttft == pytest.approx(1.33, abs=5e-3)
    weights = 2 * (32 * 218_103_808 + 128256 * 4096)
    cache = 16 * 2**30
    assert savings.tpot_ratio == pytest.approx((weights + 0.75 * cache) / (weights + cache), abs=1e-4)
    assert savings.within_positions


@pytest.mark.parametrize("anchors", [0, 1, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 1000])
def test_full_depth_saves_nothing(n, anchors):
    (savings,) = predict_savings(llama_8b_shape(), 32, anchors=anchors, lengths=[n])
    assert savings.ttft_ratio == savings.tpot_ratio == savings.kv_ratio == savings.speedup_ttft == 1
    assert savings.kv_bytes == savings.kv_bytes_full


@pytest.mark.parametrize("anchors", [0, 1, 4])
@pytest.mark.parametrize("cutoff", [1, 17, 31])
def test_cache_holds_the_prompt_below_and_anchors_and_last_token_above(cutoff, anchors):
    n, per_position = 777, 2 * 8 * 128 * 2
    (savings,) = predict_savings(llama_8b_shape(), cutoff, anchors=anchors, lengths=[n])
    assert savings.kv_bytes == per_position * (cutoff * n + (32 - cutoff) * (anchors + 1))


def test_a_prompt_shorter_than_its_anchors_is_counted_once():
    (savings,) = predict_savings(TOY, 1, anchors=8, lengths=[3])
    assert savings.kv_bytes == savings.kv_bytes_full == 16 * 6
    assert savings.ttft_ratio == 1


def test_deeper_cutoffs_save_less():
    rows = [predict_savings(llama_8b_shape(), k, lengths=[4096])[0] for k in range(1, 33)]
    for name in ("ttft_ratio", "tpot_ratio", "kv_ratio"):
        values = [getattr(row, name) for row in rows]
        assert values == sorted(values)
        assert len(set(values)) == 32


@pytest.mark.parametrize("n", [1, 3, 4, 5, 40])
def test_sliding_layers_hold_and_read_a_window(n):
    window = 4
    shape = TOY | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    assert kv_bytes(shape, Held(n, [n, n])) == 16 * (min(n, window - 1) + n)  # the next token sees 3 others
    (savings,) = predict_savings(shape, 1, anchors=0, lengths=[n])
    pairs = sum(min(i, window) for i in range(1, n + 1))  # counted one query at a time
    sliding = 2 * 100 * n + 32 * pairs
    full = 2 * 100 * n + 32 * sum(range(1, n + 1))
    deep = 2 * 100 + 32
    assert savings.ttft_ratio == pytest.approx((sliding + deep + 100) / (sliding + full + 100), rel=1e-12)
    assert savings.kv_bytes == 16 * (min(n, window - 1) + 1)


def test_lengths_beyond_the_positions_are_marked():
    marks = [s.within_positions for s in predict_savings(TOY, 1, lengths=[511, 512, 513], max_positions=512)]
    assert marks == [True, True, False]


def test_of_a_mixture_of_experts_only_the_chosen_ones_count():
    anatomy = tiny_model("gpt_oss").anatomy  # 2 of 4 experts
    parts = {name: p.numel() for name, p in anatomy.layers[0].named_parameters()}
    experts = sum(count for name, count in parts.items() if "experts" in name)
    assert anatomy.shape["layer_parameters"][0] == sum(parts.values()) - experts // 2


@pytest.mark.parametrize("n_new", [0, 1, 2, 3, 9])
def test_anchors_slide_out_of_a_window(n_new):
    """Columns 0 and 1 (anchors), 9 (boundary) and the new ones, of which the next token sees the last three."""
    total, window = 10 + n_new, 4
    held = Held.after(10, n_new, [3], anchors=2)
    columns = [0, 1, *range(9, total)]
    assert held.within(0, window) == sum(column > total - window for column in columns)
    assert Held.after(2, n_new, [2], anchors=2).within(0, window) == min(2 + n_new, window - 1)
