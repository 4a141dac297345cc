"""The original image-reward package (1.5) as a server. Its environment is described in remote-rewards.md."""

import torch
from serve import arguments, serve


def make_score(args):
    import ImageReward

    model = ImageReward.load(args.weights, device=args.device, med_config=args.med_config)

    def score(pictures, prompts, metadata):
        with torch.no_grad():
            return list(map(model.score, prompts, pictures))

    return score


def parser():
    parser = arguments("ImageReward over HTTP")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", default="ImageReward-v1.0", help="this name, or a file")
    parser.add_argument("--med-config", help="a file (default: downloaded)")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    serve(make_score(args), "image-reward", args)
