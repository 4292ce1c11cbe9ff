"""Lines to try, and the page of the documentation, for each command: the end of its --help."""

from diagnostics.cli.help import epilog

PROGRAM = "speed-diagnostics"

EPILOGS = {
    "recommend": epilog(
        "guides/first-cutoff/",
        f"{PROGRAM} recommend --max-prompts 14 --out runs/first",
        f"{PROGRAM} recommend runs/first --max-kl 0.05",
        f"{PROGRAM} recommend --max-prompts 14 --without-sweep",
        f"{PROGRAM} recommend path/to/model --prompts mine.jsonl",
    ),
    "diagnose": epilog(
        "guides/first-cutoff/",
        f"{PROGRAM} diagnose --max-prompts 14 --out runs/first",
        f"{PROGRAM} diagnose --out runs/first --resume",
    ),
    "generate": epilog(
        "guides/policies/",
        f'{PROGRAM} generate --prompt "Name three planets." --cutoff 25',
        f"{PROGRAM} generate --prompt @question.txt --policy speed:24 --compare",
        f"{PROGRAM} generate --prompt @- --recommendation runs/first < q.txt",
    ),
    "bench": epilog(
        "guides/policies/",
        f"{PROGRAM} bench --lengths 512,2K --policies full,speed:24,fastkv",
    ),
    "evaluate": epilog(
        "guides/evaluation/",
        f"{PROGRAM} evaluate --tasks needle@2K,mine.jsonl --policies speed:24",
        f"{PROGRAM} evaluate --tasks arc_easy --policies speed:24 --limit 200",
    ),
    "finetune": epilog(
        "guides/fine-tuning/",
        f"{PROGRAM} finetune --cutoff 20 --out runs/tuned",
        f"{PROGRAM} finetune path/to/model --cutoff 24 --data mine.jsonl",
    ),
    "report": epilog("guides/figures/", f"{PROGRAM} report runs/first --html first.html"),
    "dashboard": epilog(
        "guides/dashboard/",
        f"{PROGRAM} dashboard",
        f"{PROGRAM} dashboard runs/first --token",
    ),
}
PROGRAM_EPILOG = epilog(
    "",
    f"{PROGRAM} recommend --max-prompts 3 --context-length 256",
    f"{PROGRAM} dashboard",
)
