"""Names of four photos and xattn's Grad-CAM maps of them -> photos.json."""

import json

import torch
from cases import HERE, PHOTOS, POSITIONS, _plain, _short_lists

from xattn import load_backbone
from xattn.explainers import create_explainer
from xattn.photos.images import list_images, load_image
from xattn.photos.view import prepare

backbone = load_backbone("tf_efficientnet_lite0", weights="package")
paths = list_images(PHOTOS)
names = [str(paths[i].relative_to(PHOTOS)) for i in POSITIONS]
images = torch.stack([prepare(load_image(PHOTOS / n), backbone.preprocessing)[0] for n in names])
with torch.no_grad():
    targets = backbone.logits(images).argmax(1)
maps = create_explainer("gradcam", backbone).attribute(images, targets)
text = json.dumps({"photos": names, "maps": _plain(maps)}, indent=1)
(HERE / "photos.json").write_text(_short_lists(text) + "\n")
