"""Mistakes at the command line that stand in no other file."""

from mistakes.table import Typed

MODEL = "-b test_resnet --weights random --device cpu --explainers cam"

MISTAKES = [
    # commands and options
    Typed("expalin {photo}", ("command: ", "did you mean explain?")),
    Typed("gradcam {photo}", ("command: ", "choose one of train, probe")),
    Typed("explain {photo} --tpo 3", ("option: xattn explain has no --tpo; did you mean --top",)),
    Typed("explain {photo} --gpu", ("option: xattn explain has no --gpu", "xattn explain --help")),
    Typed("train {folder} --lr_rate 1", ("option: xattn train has no --lr-rate", "--help")),
    Typed("explain {photo} --top three", ("top: got 'three'; give a whole number",)),
    Typed("explain {photo} --top", ("top: expected one argument",)),
    Typed("train {folder} --lr fast", ("lr: got 'fast'; give a number",)),
    Typed("explain {photo} --view corp", ("view: got 'corp'; did you mean crop?",)),
    Typed("bench attenton", ("job: got 'attenton'; did you mean attention?",)),
    Typed("parts {photo}", ("evidence: got none; give xattn parts --evidence",)),
    Typed("export", ("path: got none; give xattn export PATH",)),
    Typed("export a.onnx b.onnx", ("argument: got 'b.onnx'; xattn export takes 1",)),
    Typed("list metrix", ("what: got 'metrix'; did you mean metrics?",)),
    # photos
    Typed("explain", ("images: got none", "before options")),
    Typed("compare --heads {folder} {photo}", ("images: got none", "before options")),
    Typed("explain {folder}/nope.jpg", ("images: ", "nope.jpg", "give an image, a folder")),
    Typed("explain {photo} {folder}/nope.jpg", ("images: 1 of 2 photos", "nope.jpg")),
    Typed("probe {folder}/none", ("images: no file or folder",)),
    Typed("evaluate {photo} hfds/cifar10:test", ("images: got hfds/cifar10:test", "alone")),
    Typed("explain {photo} clip.mp4", ("images: 1 of 2 photos are not there: clip.mp4",)),
    Typed("explain {photo} --limit 0", ("limit: got 0; give at least 1",)),
    Typed("distill {photo} --mechanism gna --validation none/", ("validation: no file or folder",)),
    # files beside the photos
    Typed("explain {photo} --labels none.csv", ("labels: no file none.csv", '"folders"')),
    Typed("explain {photo} --labels {folder}", ("labels: ", "is a folder", ".csv")),
    Typed("compare {photo} --annotations {folder}", ("annotations: ", "masks/ or boxes/")),
    Typed("app {folder} --annotations {folder}", ("annotations: ", "masks/ or boxes/")),
    Typed("explain {photo} --weights mine.pth", ("weights: no file 'mine.pth'",)),
    Typed("explain {photo} --weights packge", ("weights: ", "did you mean package?")),
    Typed("explain {photo} --class-names none.txt", ("class_names: none.txt is not there",)),
    Typed("parts {photo} --evidence none.json", ("evidence: no file or folder none.json",)),
    # heads, outputs
    Typed("explain {photo} --heads runs/mine/", ("heads: no folder runs/mine/",)),
    Typed("evaluate {photo} --heads {folder}", ("heads: ", "holds no config.json")),
    Typed("compare {photo} --heads {photo}", ("heads: ", "is a file; name the folder")),
    Typed(
        "explain {photo} --heads evidense-efficientnet-lite0", ("heads: ", "evidence-efficientnet")
    ),
    Typed("export a.pt2 --heads {folder} {folder}", ("heads: ", "holds no config.json")),
    Typed("export a.pth", ("path: got a.pth", ".pt2 or .onnx")),
    Typed("explain {photo} --output {photo}", ("output: ", "is a file; name a folder")),
    Typed("train {photo} --output {folder}", ("output: ", "is not empty and holds no run")),
    Typed("train {photo} --resume", ("resume: runs/head holds no run",)),
    Typed("prune {photo} --output {folder} --resume", ("resume: ", "holds no run")),
    # networks and names
    Typed("explain {photo} --device gpu", ("device: got 'gpu'", "cpu")),
    Typed("explain {photo} --device cuda:99", ("device: 'cuda:99' is not", "use cpu, or install")),
    Typed("explain {photo} -b mine.pth", ("backbone: mine.pth is a file", "--weights mine.pth")),
    Typed(
        "explain {photo} --explainers randomized_head",
        ("explainers: ", "of several heads the first"),
    ),
    Typed("evaluate {photo} --metrics AD", ("metrics: ", "AD is a column of the group masking")),
    Typed("explain {photo} --device cuda1", ("device: got 'cuda1'; did you mean cuda",)),
    Typed("explain {photo} --mechanism gna --layers 4..11", ("layers: got '4..11'", '"4-11"')),
    Typed("explain {photo} --layers 4-11", ("layers: got 4-11 without --mechanism",)),
    Typed("explain {photo} --mechanism gnaa -b test_vit", ("mechanism: ", "did you mean gna")),
    Typed("explain {photo} --mechanism runs/x", ("mechanism: no folder runs/x",)),
    Typed("distill {photo}", ("mechanism: got none; name the one to train",)),
    Typed("explain {photo} -b resnet81 --weights random", ("backbone: ", "resnet18")),
    Typed("explain {photo} --explainers gradcm", ("explainers: ", "did you mean gradcam")),
    Typed("compare {photo} --metrics raod", ("metrics: ", "did you mean road")),
    Typed("evaluate {photo} --preset rize", ("preset: unknown 'rize'; did you mean rise?",)),
    Typed("train {photo} --head tame", ("head: ", "ttame")),
    Typed("probe {photo} --heads efficientprob", ("heads: ", "efficient_probe")),
    # classes of the network
    Typed(f"explain {{photo}} {MODEL} --classes cat", ("class 'cat'", "283 'Persian cat'")),
    Typed(
        f"explain {{photo}} {MODEL} --classes 281,1000", ("class 1000 is out of range", "0..999")
    ),
    Typed(
        f"explain {{photo}} {MODEL} --classes n00000000",
        ("class 'n00000000' is not a WordNet id", "did you mean"),
    ),
    Typed(f"explain {{photo}} {MODEL} --classes tabbby", ("class 'tabbby'", "tabby")),
]
