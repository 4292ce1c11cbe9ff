"""The goals that a cutoff can have to meet: the argument of `recommend`, and its wording in a sentence."""

GOALS = {
    "max_kl": "KL at most",
    "max_nll_increase": "NLL increase at most",
    "min_agreement": "same top token at least",
    "kv_budget": "share of full KV at most",
}
