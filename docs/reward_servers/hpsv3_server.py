"""HPSv3 (package hpsv3 1.0.0) as a server. Its environment is described in remote-rewards.md."""

import torch
from serve import arguments, serve


def make_score(args):
    from hpsv3 import HPSv3RewardInferencer

    inferencer = HPSv3RewardInferencer(checkpoint_path=args.weights, device=args.device)

    def score(pictures, prompts, metadata):
        with torch.no_grad():
            logits = inferencer.reward(image_paths=pictures, prompts=prompts)  # it takes pictures as well as paths
        return logits[:, 0].float().tolist()  # the mean; the second column is the spread

    return score


def parser():
    parser = arguments("HPSv3 over HTTP")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", help="a file (default: downloaded)")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    serve(make_score(args), "hpsv3", args)
