"""What the terms that people meet mean, in one sentence each: for tooltips, the report and the help."""

GLOSSARY = {
    "cutoff": "Number of layers that prompt tokens run through; above it only anchors, the last prompt token and "
    "generated tokens run. At the number of all layers it is the stock model.",
    "anchor": "Leading token, usually BoS, that runs through all layers whatever the cutoff.",
    "decode position": "The last prompt token and every token after it; each predicts one token of the reference.",
    "reference": "The answer on which the loss is measured: the given one, or the model's own at full depth.",
    "KL": "Kullback-Leibler divergence of the next-token distribution under SPEED from that at full depth, mean over "
    "decode positions and prompts, in nats per token; 0 means no change.",
    "bound": "Upper confidence bound of the mean over prompts (bootstrap): another sample of such prompts is expected "
    "to stay below it.",
    "same top token": "Share of decode positions at which SPEED and full depth find the same token most likely.",
    "NLL increase": "By how much the negative log-likelihood of the reference is higher under SPEED than at full "
    "depth, in nats per token.",
    "NLL": "Negative log-likelihood of the reference, in nats per token.",
    "TTFT": "Time to first token: how long the prompt takes. Predicted ones count the operations of the prefill.",
    "TPOT": "Time per output token: how long each further token takes. Predicted ones count the bytes that a step "
    "reads.",
    "KV cache": "Keys and values that the layers keep of all tokens so far; SPEED keeps the prompt's in the lower "
    "layers only.",
    "attention mass": "Attention weight that decode positions give to the prompt, 0 to 1, mean over heads.",
    "attention kept": "Share of the attention mass on the prompt that lies in layers below the cutoff.",
    "contribution": "Norm of what the attention adds to the residual from the prompt, relative to the residual.",
    "contribution kept": "Share of what all layers take from the prompt that layers below the cutoff take.",
    "selectivity": "How much decode positions differ in which prompt tokens they look at, 0 to 1; a sink that all of "
    "them share has none.",
    "drift": "1 - cosine between a token's residual before and after a layer; centred: after subtracting the mean over "
    "the prompt.",
    "logit lens": "The next-token distribution that the final norm and the unembedding read out of a layer's output.",
    "uptake": "What decode positions take from the prompt in a layer: selectivity x contribution / update. Its sum "
    "over the layers above a cutoff foretells the loss there.",
    "removal effect": "How much what a layer's attention adds to the residual would change if the prompt's keys were "
    "taken away there, relative to the residual.",
    "leave-one-out loss": "KL from full depth where decode positions do not see the prompt in one layer alone, in "
    "nats per token.",
    "rule": "What names a cutoff from the layers alone, without the measured loss.",
    "knee": "The smallest cutoff from which on every measured mean KL is within the goal.",
    "selection region": "Layers in which decode positions select information from the prompt: those in which they must "
    "see it.",
    "stabilization region": "Layers, up to the last, in which the prompt's residuals hardly change any more; it "
    "describes the prompt and names no cutoff.",
    "evidence": "The part of a prompt that holds the answer, where that is known.",
    "non-inferior": "With 95% confidence not further below full depth than the margin.",
    "margin": "Loss of score that is tolerated, in points.",
    "limit": "Ratio to full depth if time were proportional to operations (TTFT), bytes read (TPOT) or bytes held "
    "(KV): counted, not measured.",
}
