"""``python -m xattn.eval.studies NAME [options]``: rerun a study of docs/results/, from a checkout.

Each study is a module with a function ``study``, whose signature gives the options and which yields
the lines to print. A stopped study resumes from its output folder.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

try:
    import tyro
except ModuleNotFoundError:
    sys.exit('studies: tyro is not installed; run in the checkout: pip install -e ".[studies]"')

from xattn.runtime.names import did_you_mean
from xattn.runtime.process import sleep_while_waiting

STUDIES = {
    "action-proposals": (
        "action_proposals",
        "Class-semantic attention in a boundary-matching network: action proposals in drawn sequences.",
    ),
    "at": (
        "attention_text_report",
        "Attention training on text: vanilla, random, AT, iAT, VAT and others on sentiment trees (SST).",
    ),
    "attention-maps": (
        "attention_maps",
        "Each attention mechanism's own maps of one photo, a picture for each.",
    ),
    "bench-answers": (
        "benches.answers",
        "What a pack with a map of every word costs, beside a vision-language model's answer alone.",
    ),
    "bench-causal": (
        "benches.causal_forms",
        "Causal forms of attention beside bidirectional ones.",
    ),
    "bench-fidelity": (
        "benches.fidelity",
        "The cost of fidelity metrics, beside the forward passes that they need.",
    ),
    "bench-growth": (
        "benches.growth",
        "How the time and memory of attention grow with the number of tokens.",
    ),
    "bench-heads": ("benches.heads", "Attentive heads against multi-head cross-attention."),
    "bench-load": (
        "benches.load",
        "How much other programs on the machine slow xattn down, by how threads wait.",
    ),
    "bench-maps": (
        "benches.maps",
        "Attention maps computed on request, against stored ones.",
    ),
    "bench-probe": (
        "benches.probes",
        "Epochs from cached features against epochs through the backbone; attention training.",
    ),
    "bench-pruning": ("benches.pruning", "A ViT that drops tokens, against the whole one."),
    "bench-relevance": (
        "benches.relevance",
        "Relevance composites beside a plain forward and backward pass: time and memory.",
    ),
    "bench-rows": (
        "benches.reading_rows",
        "Reading rows of attention while a language model uses its own kernels: memory and time.",
    ),
    "bench-skipped-heads": (
        "benches.skipped_heads",
        "moh with half of its heads, beside moh with all of them.",
    ),
    "bench-startup": ("benches.startup", "How long the command line takes to answer."),
    "blocks": (
        "block_digits",
        "NiNformer, HyperZZW and SHRP on digits, each beside the baseline that it has to beat.",
    ),
    "board": (
        "own_board",
        "xattn's own board: many methods on a network, on photos that no head was trained on.",
    ),
    "ceiling": (
        "ceiling",
        "How far methods are from the best pixel order that a search finds, in insertion and deletion.",
    ),
    "class-folds": (
        "class_folds",
        "Cross-validation over classes: every photo is scored by a head that never saw its class.",
    ),
    "clip-cues": (
        "clip_cues",
        "Clips whose class depends on one frame: which methods point at it?",
    ),
    "coarse-groups": (
        "coarse_groups",
        "Per-class heads on coarse groups, with a linear probe on a frozen encoder.",
    ),
    "controls": (
        "content_controls",
        "A ViT and its maps when attention carries no content; networks trained that way.",
    ),
    "depths": (
        "conversion_depths",
        "How many of a ViT's last blocks can be converted: the mechanism alone, then with updates.",
    ),
    "detection-cues": (
        "detection_cues",
        "Detections whose class is decided outside their box: which methods point at the cue?",
    ),
    "dial": (
        "localist_dial",
        "The localist dial in a trained ViT: mass, agreement, steering, and recruited regions.",
    ),
    "exact-rollout": (
        "exact_rollout",
        "Networks on digits whose rollout is exact: contributions, beside the deletion of tokens.",
    ),
    "explainers-by-family": (
        "explainer_families",
        "Which explainers run on which families of networks: timm, clips, detectors, segmenters.",
    ),
    "exports": (
        "exports",
        "The largest differences of exported files from PyTorch, and of two processes from one.",
    ),
    "fold-rows": (
        "fold_rows",
        "Rows of a table, each trained and scored alone on photos of classes that its head never saw.",
    ),
    "gallery": (
        "gallery",
        "Every explainer's maps of six photos, and the cost of explainers, heads and metrics for one.",
    ),
    "head-sanity": (
        "head_sanity",
        "Do maps of trained heads depend on weights, photo and class, and follow the object?",
    ),
    "icl": (
        "in_context_regression",
        "In-context linear regression: the circuit that softmax heads learn, beside the theory's.",
    ),
    "image": (
        "attention_image",
        "Attention training on images: do attentive heads' maps agree better with what matters?",
    ),
    "larger-clips": (
        "larger_clips",
        "FreeSwim on clips of four times the trained size: are objects repeated?",
    ),
    "length": (
        "context_length",
        "Small networks trained on short sequences: how well their attention does on longer ones.",
    ),
    "lesions": (
        "lesions",
        "Attention-gated U-Nets beside a plain one on generated lesions, and where their gates point.",
    ),
    "outcome-trials": (
        "outcome_trials",
        "Variants of the evidence head, scored on photos of classes that no head saw.",
    ),
    "passkey": (
        "passkey",
        "Landmark attention, trained on 512 tokens: does it find a passkey in 32,768?",
    ),
    "pointer": ("pointers", "Pointer networks on hulls, tours and triangles."),
    "pointer-photos": (
        "cell_orders",
        "Heads that learn in which order the cells of a photo matter to a ViT.",
    ),
    "positions": (
        "position_transfer",
        "Position encodings in a ViT, trained for minutes at one size and tested at others.",
    ),
    "random-features": (
        "random_features",
        "Random-feature attention on photos: accuracy, exact maps, and the class token alone.",
    ),
    "random-labels": (
        "random_labels",
        "A head trained on outcomes with random labels, which a sound head has to beat.",
    ),
    "recall": (
        "block_recall",
        "How near block-choosing mechanisms come to the exact choice, with a trained ViT's queries.",
    ),
    "relevance": (
        "relevance",
        "Which relevance method is most faithful on a network, and what each of its rules adds.",
    ),
    "reliability-balancing": (
        "reliability_balancing",
        "ARBEx on faces with few examples of some expressions: with anchors and without.",
    ),
    "rules": (
        "rule_blocks",
        "Training with the localist dial: a language model on rules whose blocks are known or recruited.",
    ),
    "same-character": (
        "same_character",
        "Attention to words and a reference in parallel: a drawn character as another prompt asks.",
    ),
    "segment-cues": (
        "segment_cues",
        "A class at a point, decided by a mark elsewhere: which methods point at the mark?",
    ),
    "single-heads": (
        "single_heads",
        "SHRP on sentences (SST): routed heads pruned to one per layer, beside magnitude pruning.",
    ),
    "sinks": (
        "attention_sinks",
        "Attention sinks of a trained ViT, which heads to calibrate (act), and the maps before and after.",
    ),
    "swap": (
        "swapped_attention",
        "What swapping a trained ViT's attention costs: accuracy, maps, time and memory.",
    ),
    "terminator": (
        "terminator",
        "The Terminator (hyper-kernels) on digits, beside small ResNets and ViTs trained as long.",
    ),
    "vlm": (
        "vlm_evidence",
        "Vision-language models trained here, whose evidence is known: what each method shows.",
    ),
    "vpu": (
        "part_utilization",
        "Visual Part Utilization: does it move a head's attention onto the text of image macros?",
    ),
    "words": (
        "words",
        "A head that learns words from captions: does a word match the photo, does its map find it?",
    ),
}
"""The module of each study, and what the study asks."""

PROG = "python -m xattn.eval.studies"


def study_lines(study: Any, words: Sequence[str], name: str, about: str) -> Iterator[str]:
    """Run ``study`` with the options in ``words``, and return the lines that it yields."""
    words = ["--backbone" if word == "-b" else word for word in words]
    prefix = (tyro.conf.OmitArgPrefixes,)
    with warnings.catch_warnings():  # settings that a recipe fills in have the default None
        warnings.filterwarnings("ignore", "The field .* is annotated with type")
        found: Iterator[str] = tyro.cli(
            study, args=words, prog=f"{PROG} {name}", description=about, config=prefix
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study that ``arguments`` name, or list all studies; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(f"{PROG} NAME [options]; NAME --help lists the options.")
        print("bench-... --raw FILE.csv keeps what every round measured.\n")
        for name, (_, about) in STUDIES.items():
            print(f"  {name:21} {about}")
        return 0
    name, *rest = words
    if name not in STUDIES:
        print(f"study: no {name!r}; {did_you_mean(name, STUDIES)}", file=sys.stderr)
        return 2
    sleep_while_waiting()  # before torch is imported
    module, about = STUDIES[name]
    study = import_module(f"xattn.eval.studies.{module}").study
    from xattn.runtime.measuring import record_rounds
    from xattn.runtime.process import keep_memory

    keep_memory()
    raw = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    raw.add_argument("--raw", type=Path)
    kept, rest = raw.parse_known_args(rest)
    try:
        with record_rounds(kept.raw):
            for line in study_lines(study, rest, name, about):
                print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
