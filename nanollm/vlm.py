"""The vision-language model: a GPT that reads pictures where its text says <image>.

    picture (3, H, W) -> ViT -> features (N, C_v) -> projector -> (n, C), n tokens of the GPT

In the token ids every picture stands as n placeholders, and their embeddings are overwritten by the
projected features; everything else is the GPT as it was (Liu et al. 2023, LLaVA, arXiv:2304.08485).

Shapes: P pictures, N patches, n tokens per picture, B rows, T tokens, C channels. Folders:
vlm_files.py; rows of training data: picture_data.py.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.gpt import GPT, Linear
from nanollm.vision import CLIP_KIND

IMAGE = "<image>"
PROJECTORS = ("linear", "mlp", "pixel_shuffle")


class Projector(nn.Module):
    """Features of patches (P, N, C_v) -> embeddings of the language model (P, n, C).

    linear: W x + b, n = N (Liu et al. 2023, arXiv:2304.08485)
    mlp: W2 gelu(W1 x + b1) + b2, n = N (LLaVA-1.5, Liu et al. 2023, 2310.03744)
    pixel_shuffle: r x r neighbouring patches side by side in the channels, then the mlp, so that
    n = N / r^2 (Shi et al. 2016, 1609.05158, backwards; as in InternVL, Chen et al. 2024,
    2404.16821)

    Patches stand in raster order, and so do the groups of them.
    """

    def __init__(self, vision_size, text_size, kind="mlp", r=2):
        super().__init__()
        if kind not in PROJECTORS:
            raise UserError(f"unknown projector {kind!r}; there are {', '.join(PROJECTORS)}")
        self.kind, self.r = kind, r if kind == "pixel_shuffle" else 1
        self.linear_1 = Linear(self.r**2 * vision_size, text_size)
        self.linear_2 = None if kind == "linear" else Linear(text_size, text_size)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def tokens(self, patches):
        """n for N patches; raises UserError where their grid can't be grouped by r x r."""
        side = math.isqrt(patches)
        if self.r > 1 and (side**2 != patches or side % self.r):
            raise UserError(
                f"pixel_shuffle wants a square grid of patches whose side {self.r} divides, not "
                f"{patches} patches; choose another picture or patch size, or the projector mlp"
            )
        return patches // self.r**2

    def group(self, x):
        """(P, N, C) -> (P, n, r r C): what stands side by side."""
        P, N, C = x.shape
        n, r, side = self.tokens(N), self.r, math.isqrt(N)
        if r == 1:
            return x
        x = x.view(P, side // r, r, side // r, r, C).transpose(2, 3)
        return x.reshape(P, n, r * r * C)  # rows of groups, in each r rows of r patches

    def forward(self, x):
        x = self.linear_1(self.group(x))
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))

    @torch.no_grad()
    def calibrate(self, x, size):
        """Adapt a new projector to features x (P, N, C_v), so that what comes out has root mean
        square `size`, as the embeddings of words have. A tower's features have large means that say
        nothing of the picture; unadapted, its tokens are many times larger than words, all alike to
        the layers that normalise them, and hardly changed by what layers add.

        Standardises the first layer's inputs by its own weights and scales the last layer
        (Kraehenbuehl et al. 2016, arXiv:1511.06856, section 3).
        """
        groups = self.group(x.float()).flatten(0, 1)
        first, last = self.linear_1, self.linear_2 or self.linear_1
        first.weight.div_(groups.std(0) + 1e-6)
        first.bias.copy_(-first.weight @ groups.mean(0))
        scale = size / self(x.float()).square().mean().sqrt()
        last.weight.mul_(scale)
        last.bias.mul_(scale)


class VLM(GPT):
    """A GPT with eyes: a vision tower, a projector, and the id of the token <image>.

    `pictures` (P, 3, H, W) are given in the order in which their placeholders stand in the batch,
    row after row. Rows of text alone have none, and a batch of such rows needs no pictures. What
    `look` has made of pictures may stand for them.
    """

    def __init__(self, cfg, vision, projector, image_id, feature_layer=-2, class_token=False):
        """vision: a ViT; projector: a kind; feature_layer: which of the ViT's hidden states;
        class_token: the class token's as well, in front of the patches' (CLIP's kind of tower).
        """
        super().__init__(cfg)
        if not isinstance(feature_layer, int):
            raise UserError(f"features of one layer are wanted, not of {feature_layer}")
        layers = vision.cfg.num_hidden_layers
        if not -layers - 1 <= feature_layer <= layers:
            raise UserError(f"the vision tower has {layers} layers; there is no {feature_layer}")
        if class_token and vision.cfg.model_type != CLIP_KIND:
            raise UserError("this vision tower has no class token; add --no_class_token")
        if class_token and projector == "pixel_shuffle":
            raise UserError(
                "pixel_shuffle joins patches that stand side by side, and a class token stands "
                "nowhere; leave it out with --no_class_token"
            )
        self.vision, self.image_id, self.feature_layer = vision, image_id, feature_layer
        self.class_token = class_token
        self.projector = Projector(vision.cfg.hidden_size, cfg.hidden_size, projector)
        self.preprocessing = None  # from a Pillow picture to what the vision tower reads
        self.tokens_per_picture  # raises where the projector doesn't fit the patches

    @property
    def tokens_per_picture(self):
        return self.projector.tokens(self.vision.cfg.num_patches + self.class_token)

    def forward(self, tokens, positions=None, mask=None, cache=None, where=None, pictures=None):
        """As GPT's; pictures as the class says."""
        hidden = self.hidden(tokens, positions, mask, cache, pictures)
        return self.head(hidden if where is None else hidden[where])

    def hidden(self, tokens, positions=None, mask=None, cache=None, pictures=None):
        """What the head reads: (B, T, C)."""
        x = self.model.embed_tokens(tokens).to(self.compute_dtype)
        decoding = cache is not None and tokens.shape[1] == 1 and pictures is None
        if not decoding:  # counting would make a GPU wait
            x = self.see(x, tokens, pictures)
        return self.model(x, positions, mask, cache)

    def see(self, x, tokens, pictures):
        """Embeddings x (B, T, C) of the tokens, those of placeholders overwritten by features."""
        where = tokens == self.image_id
        places, P = int(where.sum()), 0 if pictures is None else len(pictures)
        n = self.tokens_per_picture
        if places != P * n:
            raise UserError(
                f"the tokens hold {places} placeholders, but {P} pictures of {n} tokens each need "
                f"{P * n}"
            )
        if P:
            return x.masked_scatter(where[..., None], self.picture_features(pictures).to(x.dtype))
        if self.training and torch.is_grad_enabled():
            # DDP waits for a gradient of all that is trained, here it is zero
            eyes = [*self.vision.parameters(), *self.projector.parameters()]
            x = x + sum(0.0 * p.sum() for p in eyes if p.requires_grad)
        return x

    def look(self, pictures):
        """(P, 3, H, W) -> what the projector reads, (P, N, C_v). A frozen tower needs to look but
        once at a picture that is read many times.
        """
        self.vision.compute_dtype = self.compute_dtype
        seen = self.vision.features(pictures, self.feature_layer, self.class_token)
        return seen.to(self.compute_dtype)

    def picture_features(self, pictures):
        """(P, 3, H, W), or (P, N, C_v) from `look`, -> (P, n, C)."""
        return self.projector(self.look(pictures) if pictures.dim() == 4 else pictures)

    @torch.no_grad()
    def calibrate(self, pictures):
        """Adapt a new projector to the tower's features of these pictures (P, 3, H, W)."""
        size = self.model.embed_tokens.weight.square().mean().sqrt()
        self.projector.calibrate(self.look(pictures), size)

    def train_parts(self, vision=False, projector=True, language=False):
        """Say which parts are trained; the others are frozen. What of the vision tower lies behind
        the layer whose features are read is frozen in any case: it would get no gradient.
        """
        self.requires_grad_(False)
        eyes, depth = self.vision, self.feature_layer % (len(self.vision.encoder.layers) + 1)
        parts = [self.projector] * projector + [self.model, self.lm_head] * language
        parts += [eyes.embeddings, eyes.pre_layrnorm, *eyes.encoder.layers[:depth]] * vision
        for part in parts:
            if part is not None:
                part.requires_grad_(True)


# --- text with pictures --------------------------------------------------------------------------


def image_id_of(tokenizer):
    """The id of <image>; raises UserError where the tokenizer has none."""
    if IMAGE not in tokenizer.special:
        raise UserError(
            f"this tokenizer has no token {IMAGE}: start from a model of this project, or one "
            "whose vocabulary has no chat tokens of its own"
        )
    return tokenizer.special[IMAGE]


def expand(ids, image_id, n):
    """The ids with n placeholders for each image_id."""
    return [id for each in ids for id in [each] * (n if each == image_id else 1)]


def render_with_pictures(tokenizer, messages, n_per_picture, pictures, generation_prompt=False):
    """As Tokenizer.render, (ids, mask), with n placeholders for each <image> in a user's turn.

    `pictures` is how many there are; raises UserError where the text has more markers, or fewer.
    """
    image_id = image_id_of(tokenizer)
    check_markers(messages, pictures)
    ids, mask = tokenizer.render(messages, generation_prompt, images=True)
    times = [n_per_picture if id == image_id else 1 for id in ids]
    mask = [trained for trained, k in zip(mask, times) for _ in range(k)]
    return expand(ids, image_id, n_per_picture), mask


def pictures_in(messages):
    """How many pictures the text of these messages has."""
    return sum(message["content"].count(IMAGE) for message in messages)


def check_markers(messages, pictures, where="the dialogue"):
    """Raise UserError, beginning with `where`, unless users' turns say <image> once per picture."""
    for message in messages:
        if message["role"] != "user" and IMAGE in message["content"]:
            raise UserError(
                f"{where}: {IMAGE} stands in a turn of the {message['role']}, but only users show "
                "pictures"
            )
    markers = pictures_in(messages)
    if markers != pictures:
        raise UserError(
            f"{where}: {markers} times {IMAGE}, but {pictures} pictures; each picture needs one"
        )


def gather_pictures(model, prompts, pictures):
    """(P, 3, H, W) on the model's device: the pictures of all prompts in order; None for none.

    prompts: lists of ids; pictures: for each a tensor (n, 3, H, W) or None; or None altogether.
    Raises UserError where a prompt has other pictures than placeholders, or the model no eyes.
    """
    if pictures is None:
        return None
    if len(pictures) != len(prompts):
        raise UserError(f"{len(prompts)} prompts, but pictures for {len(pictures)}")
    if not isinstance(model, VLM):
        if any(each is not None and len(each) for each in pictures):
            raise UserError("this model reads text only; take one that train_vlm.py has made")
        return None
    n = model.tokens_per_picture
    for number, (prompt, each) in enumerate(zip(prompts, pictures)):
        places, P = prompt.count(model.image_id), 0 if each is None else len(each)
        if places != P * n:
            raise UserError(
                f"prompt {number} holds {places} placeholders, but its {P} pictures need {P * n}"
            )
    shown = [each for each in pictures if each is not None and len(each)]
    return torch.cat(shown).to(model.device) if shown else None
