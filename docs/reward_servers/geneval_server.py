"""GenEval (github.com/djghosh13/geneval) as a server: 1 if the picture is correct, else 0. Its environment is described in remote-rewards.md.

Each prompt needs the metadata of GenEval's prompt files: `tag`, `include` and, where there is one, `exclude`. A prompt without `include` gets
no reward.
"""

import importlib.util
import os
import sys
import tempfile
from types import SimpleNamespace

from serve import arguments, serve


def load_geneval(folder, weights, model_config):
    """The module that evaluates, with the globals that its own main program sets."""
    path = os.path.join(folder, "evaluation", "evaluate_images.py")
    spec = importlib.util.spec_from_file_location("evaluate_images", path)
    geneval = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = geneval
    spec.loader.exec_module(geneval)
    if model_config is None:
        configs = os.path.join(os.path.dirname(geneval.mmdet.__file__), "..", "configs", "mask2former")
        model_config = os.path.join(configs, "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py")
    geneval.args = SimpleNamespace(options={}, model_path=weights, model_config=model_config)
    detector, (clip_model, transform, tokenizer), classnames = geneval.load_models(geneval.args)
    geneval.object_detector, geneval.classnames = detector, classnames
    geneval.clip_model, geneval.transform, geneval.tokenizer = clip_model, transform, tokenizer
    geneval.THRESHOLD, geneval.COUNTING_THRESHOLD = 0.3, 0.9  # its defaults, all five
    geneval.MAX_OBJECTS, geneval.NMS_THRESHOLD, geneval.POSITION_THRESHOLD = 16, 1.0, 0.1
    return geneval


def make_score(args):
    geneval = load_geneval(args.geneval, args.weights, args.model_config)

    def one(picture, prompt, metadata):
        if "include" not in metadata:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "picture.png")
            picture.save(path)
            row = dict({"tag": "", "prompt": prompt}, **metadata)
            return float(geneval.evaluate_image(path, row)["correct"])

    def score(pictures, prompts, metadata):
        return list(map(one, pictures, prompts, metadata))

    return score


def parser():
    parser = arguments("GenEval over HTTP")
    parser.add_argument("--geneval", default="geneval", help="folder of the cloned repository")
    parser.add_argument("--weights", default="./", help="folder of the detector's .pth file")
    parser.add_argument("--model-config", help="of the detector (default: the one beside mmdet)")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    serve(make_score(args), "geneval", args)
