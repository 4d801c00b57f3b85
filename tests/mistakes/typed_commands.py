"""Mistakes at the command line."""

import importlib.util

from mistakes.table import Typed

NET = "explain {photo} -b test_resnet --weights random --device cpu"
MODEL = "-b test_resnet --weights random --device cpu --explainers cam"

MISTAKES = [
    # commands and options
    Typed("expalin {photo}", ("command: ", "did you mean explain?")),
    Typed("gradcam {photo}", ("command: ", "choose one of train, probe")),
    Typed("explain {photo} --tpo 3", ("option: xattn explain has no --tpo; did you mean --top",)),
    Typed("train {folder} --lr_rate 1", ("option: xattn train has no --lr-rate", "--help")),
    Typed("explain {photo} --top three", ("top: got 'three'; give a whole number",)),
    Typed("explain {photo} --top", ("top: expected one argument",)),
    Typed("explain {photo} --view corp", ("view: got 'corp'; did you mean crop?",)),
    Typed("bench attenton", ("job: got 'attenton'; did you mean attention?",)),
    Typed("parts {photo}", ("evidence: got none; give xattn parts --evidence",)),
    Typed("export", ("path: got none; give xattn export PATH",)),
    Typed("export a.onnx b.onnx", ("argument: got 'b.onnx'; xattn export takes 1",)),
    Typed("list metrix", ("what: got 'metrix'; did you mean metrics?",)),
    # photos
    Typed("explain", ("images: got none", "before any option that takes several values")),
    Typed("explain {folder}/nope.jpg", ("images: ", "nope.jpg", "give an image, a folder")),
    Typed("explain {photo} {folder}/nope.jpg", ("images: 1 of 2 photos", "nope.jpg")),
    Typed("evaluate {photo} hfds/cifar10:test", ("images: got hfds/cifar10:test", "alone")),
    Typed("explain {photo} clip.mp4", ("images: 1 of 2 photos do not exist: clip.mp4",)),
    Typed("explain {photo} --limit 0", ("limit: got 0; give an int of at least 1",)),
    Typed("distill {photo} --mechanism gna --validation none/", ("validation: no file or folder",)),
    # files beside the photos
    Typed("explain {photo} --labels none.csv", ("labels: no file none.csv", '"folders"')),
    Typed("compare {photo} --annotations {folder}", ("annotations: ", "masks/ or boxes/")),
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
    Typed("export a.pth", ("path: got a.pth", ".pt2 or .onnx")),
    Typed("explain {photo} --output {photo}", ("output: ", "is a file; name a folder")),
    Typed("train {photo} --output {folder}", ("output: ", "is not empty and holds no run")),
    Typed("train {photo} --resume", ("resume: runs/head holds no run",)),
    # networks and names
    Typed("explain {photo} --device gpu", ("device: got 'gpu'", "cpu")),
    Typed("explain {photo} --device cuda:99", ("device: 'cuda:99' is not", "use cpu, or install")),
    Typed(
        "explain {photo} -b mine.pth", ("backbone: mine.pth is a weight file", "--weights mine.pth")
    ),
    Typed(
        "explain {photo} --explainers randomized_head",
        ("explainers: ", "of several heads, the first"),
    ),
    Typed("evaluate {photo} --metrics AD", ("metrics: ", "AD is a column of the group masking")),
    Typed("explain {photo} --device cuda1", ("device: got 'cuda1'; did you mean cuda",)),
    Typed("explain {photo} --mechanism gna --layers 4..11", ("layers: got '4..11'", '"4-11"')),
    Typed("explain {photo} --layers 4-11", ("layers: got 4-11 without --mechanism",)),
    Typed("explain {photo} --mechanism gnaa -b test_vit", ("mechanism: ", "did you mean gna")),
    Typed("distill {photo}", ("mechanism: got none; give the one to train",)),
    Typed("explain {photo} -b resnet81 --weights random", ("backbone: ", "resnet18")),
    Typed("explain {photo} --explainers gradcm", ("explainers: ", "did you mean gradcam")),
    Typed("compare {photo} --metrics raod", ("metrics: ", "did you mean road")),
    Typed("evaluate {photo} --preset rize", ("preset: unknown 'rize'; did you mean rise?",)),
    Typed("train {photo} --head tame", ("head: ", "ttame")),
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
    # a model of one's own
    Typed(f"{NET} --mean 123.675 116.28 103.53", ("mean: ", "divide", "0.485")),
    Typed(f"{NET} --std 0", ("std: ", "over 0")),
    Typed(f"{NET} --crop-pct 224", ("crop: got 224", "0.875")),
    Typed(f"{NET} --interpolation biliner", ("interpolation: ", "did you mean bilinear")),
    Typed("explain {photo} -b local-dir:{folder}", ("backbone: ", "holds no config.json")),
    Typed(
        f"{NET} --explainers gradcam --options gradcam.layer=layr4",
        ("layer: ", "near matches: layer4"),
    ),
    # packs
    Typed("merge", ("packs: got none; give two or more packs",)),
    Typed("merge {folder}", ("packs: got ", "give two or more")),
    Typed("merge {folder}/a {folder}/b", ("packs: ", "is not a folder", "xattn explain wrote")),
    Typed("merge {folder} {folder}", ("packs: ", "cannot be opened", "manifest.json")),
    Typed("merge {photo} {photo}", ("packs: ", "is not a folder")),
    Typed("merge {folder} {folder} --ouput c", ("option: xattn merge has no --ouput", "--output")),
    Typed("explain {photo} --overlays -1", ("overlays: got -1", "give an int of at least 0")),
    Typed("explain {photo} --overlays two", ("overlays: got 'two'",)),
    # --import; tests/cli/test_imports.py has those with files
    Typed("list --import mine.py", ("import: mine.py does not exist", "give a Python file")),
    Typed("list --import", ("import: got no file", "--import mine.py")),
    Typed("list --import --top 3", ("import: got no file", "--import mine.py")),
    Typed(
        "list --import nowhere.mine", ("import: there is no module 'nowhere.mine'", "install it")
    ),
    Typed("list --import {photo}", ("import: ", "is not a Python file")),
    Typed("list --import {folder}", ("import: ", "is not a Python file")),
    Typed("list --import json", ("import: json registers nothing", "register_explainer")),
    # URLs of object stores
    Typed("explain x3://bucket/photos", ("images: got x3://bucket/photos", "give s3://")),
    Typed("explain s3://", ("images: got s3://; give s3://BUCKET/FOLDER",)),
    Typed("explain memory://none/a.jpg", ("images: no file or folder memory://none/a.jpg",)),
    Typed("train memory://none/photos", ("images: no file or folder memory://none/photos",)),
    Typed("explain {photo} none.jpg s3://", ("images: got s3://; give",)),
    Typed(
        "explain memory://none/b.mp4",
        ("images: memory://none/b.mp4 is a clip in an object store", "copy"),
    ),
    Typed(
        "explain memory://none/b.nii.gz", ("images: ", "is a volume in an object store", "copy it")
    ),
    Typed("explain {photo} --labels memory://none/a.csv", ("labels: no file memory://none/a.csv",)),
    Typed(
        "explain {photo} --heads s3://bucket/head", ("heads: ", "copy the head's folder to disk")
    ),
    Typed("explain {photo} --weights s3://bucket/w.pth", ("weights: ", "copy the file to disk")),
    Typed("explain {photo} --output x3://bucket/x", ("output: got x3://bucket/x", "give s3://")),
    Typed("explain {photo} --output hf://datasets/a/b", ("output: got hf://", "hf upload")),
    Typed("train {photo} --output s3://bucket/x", ("output: got s3://bucket/x, but xattn train",)),
    Typed("compare {photo} --output s3://bucket/x", ("output: got s3://", "give a local folder")),
    Typed("diff memory://none/a memory://none/b", ("packs: memory://none/a cannot be opened",)),
    Typed("app memory://none/runs", ("root: memory://none/runs is not a folder; give the URL",)),
    Typed("app memory://none/runs --demo", ("demo: memory://none/runs is read-only",)),
]
HUGGING_FACE = [
    Typed(
        "explain {photo} -b transformers:{folder}/mine",
        ("backbone: no folder ", "transformers:"),
    ),
    Typed(
        "explain {photo} -b transformers:{folder}",
        ("backbone: transformers:", "no config.json", "save_pretrained"),
    ),
    Typed(
        "explain {photo} -b google/vit-base-patch16-224",
        ("backbone: ", "transformers:google/vit-base-patch16-224"),
    ),
    Typed(
        "explain {photo} -b transformers:{folder} --weights mine.safetensors",
        ("weights: ", "mine.safetensors"),
    ),
]
if importlib.util.find_spec("transformers") is not None:
    MISTAKES += HUGGING_FACE
