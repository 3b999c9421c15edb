"""Test PSPNet and DeepLabV3, detectron2's and ours: sizes, losses, training and distillation."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

from distill.config import building, student_config, validate_config
from distill.config.validate import check_values
from distill.engine import Trainer
from distill.errors import ConfigError
from distill.families import build_family
from distill.nets import add_nets_config
from distill.nets.segmentation import mean_cross_entropy
from distill.structures import NetworkOutputs
from tests.support.networks import (
    distilled,
    distilled_from_itself,
    image_dict,
    kd_losses,
    outspoken_model,
    tiny_cfg,
    tiny_model,
    write_config,
)
from tests.support.trainings import trainable_cfg

HEAD = "MODEL.SEM_SEG_HEAD."
RESNET = "MODEL.RESNETS."
# One narrow network per head, with output stride 8.
COMMON = (
    *("MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone", RESNET + "STEM_TYPE", "basic"),
    *(RESNET + "RES4_DILATION", 2, RESNET + "RES5_DILATION", 4),
    *(RESNET + "OUT_FEATURES", ["res2", "res4", "res5"]),
    *(HEAD + "IN_FEATURES", ["res5"], HEAD + "COMMON_STRIDE", 8),
    *(HEAD + "ASPP_CHANNELS", 8, HEAD + "ASPP_DILATIONS", [2, 4, 6]),
    *(HEAD + "LOSS_TYPE", "cross_entropy"),
)
OURS = ("PSPHead", "ASPPHead")
OPTS = {name: (*COMMON, HEAD + "NAME", name) for name in (*OURS, "DeepLabV3Head")}
OPTS["DeepLabV3PlusHead"] = (
    *(*COMMON, HEAD + "NAME", "DeepLabV3PlusHead", HEAD + "IN_FEATURES", ["res2", "res5"]),
    *(HEAD + "COMMON_STRIDE", 4, HEAD + "PROJECT_CHANNELS", [4]),
)
OUTPUT_STRIDE_16 = (RESNET + "RES4_DILATION", 1, RESNET + "RES5_DILATION", 2)


@pytest.fixture
def image_dicts():
    return [image_dict(0, 64, 80, semantic=True), image_dict(1, 57, 64, objects=0, semantic=True)]


def train_step(model, inputs):
    """Run one step of SGD and return the losses before it."""
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return {k: v.item() for k, v in losses.items()}


# ---- Sizes.

PAPER = {  # (head, depth, width): (million parameters, 10^9 multiply-adds) in the IMA paper
    ("PSPHead", 18, 128): (12.61, 109),
    ("ASPPHead", 101, 512): (84.74, 695),
}


def full_size(name, depth, channels, *opts):
    """Build a model on the meta device: 19 classes, output stride 8, no auxiliary head."""
    cfg = tiny_cfg(
        "semantic",
        *(*COMMON, HEAD + "NAME", name, HEAD + "NUM_CLASSES", 19, HEAD + "NORM", "BN"),
        *(HEAD + "CONVS_DIM", channels, HEAD + "ASPP_CHANNELS", channels),
        *(HEAD + "ASPP_DILATIONS", [12, 24, 36], HEAD + "AUX_WEIGHT", 0.0),
        *(RESNET + "DEPTH", depth, RESNET + "RES2_OUT_CHANNELS", 64 if depth < 50 else 256),
        *(RESNET + "STEM_OUT_CHANNELS", 64, RESNET + "NORM", "BN", *opts),
    )
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).eval()


def multiply_adds(model, height, width):
    """Count all convolutions up to the logits at stride 8. Nothing else multiplies."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.backbone(torch.empty(1, 3, height, width, device=device))
        model.sem_seg_head.layers(features)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("key", PAPER, ids=str)
def test_sizes_are_the_papers_with_the_deep_stem(key):
    """Compare parameters without the auxiliary head, and multiply-adds of a 512x1024 image.

    The stem with three convolutions and 64 channels fits. With a 7x7 convolution PSPNet-R18 has
    12.62 M parameters and 105.9 G multiply-adds, which is 2.8 % less.
    """
    model = full_size(*key, RESNET + "STEM_TYPE", "deeplab")
    parameters, operations = PAPER[key]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert multiply_adds(model, 512, 1024) / 1e9 == pytest.approx(operations, rel=0.01)


def test_sizes_of_the_shipped_student():
    model = full_size("PSPHead", 18, 128)
    assert sum(p.numel() for p in model.parameters()) == 12_621_907
    assert multiply_adds(model, 512, 1024) / 1e9 == pytest.approx(105.95, abs=0.01)


def test_fvcore_counts_the_same():
    model = tiny_model("semantic", *OPTS["PSPHead"], training=False)
    net = torch.nn.Sequential(model.backbone)
    count = FlopCountAnalysis(net, torch.rand(1, 3, 64, 96)).unsupported_ops_warnings(False)
    model.sem_seg_head.layers = lambda features: None
    assert count.by_operator()["conv"] == multiply_adds(model, 64, 96)


# ---- Contract.


@pytest.mark.parametrize("name", OURS)
def test_outputs_are_as_the_contract_says(name):
    model = tiny_model("semantic", *OPTS[name], training=False)
    features = model.backbone(torch.rand(2, 3, 64, 96))
    logits, losses = model.sem_seg_head(features)
    assert logits.shape == (2, 4, 64, 96) and losses == {}
    assert model.sem_seg_head.layers(features).shape == (2, 4, 8, 12)
    nothing, losses = model.sem_seg_head.train()(features, torch.zeros(2, 64, 96).long())
    assert nothing is None and set(losses) == {"loss_sem_seg", "loss_sem_seg_aux"}


@pytest.mark.parametrize("opts", [(), OUTPUT_STRIDE_16, (RESNET + "DEPTH", 18)], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_predictions_have_the_size_of_the_image(name, opts):
    model = tiny_model("semantic", *OPTS[name], *opts, training=False)
    with torch.no_grad():
        (result,) = model([image_dict(0, 57, 83)])
    assert result["sem_seg"].shape == (4, 57, 83)


@pytest.mark.parametrize("name", OURS)
def test_a_gradient_reaches_every_parameter(name, image_dicts):
    model = tiny_model("semantic", *OPTS[name], norm="BN")
    sum(model(image_dicts).values()).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", OURS)
def test_without_weight_there_is_no_auxiliary_head(name, image_dicts):
    model = tiny_model("semantic", *OPTS[name], HEAD + "AUX_WEIGHT", 0.0)
    assert not any("aux" in key for key in model.state_dict())
    assert set(model(image_dicts)) == {"loss_sem_seg"}


def test_the_auxiliary_head_is_a_quarter_as_wide_and_silent_in_evaluation():
    head = tiny_model("semantic", *OPTS["PSPHead"], training=False).sem_seg_head
    assert head.aux_head.conv.in_channels == 32 and head.aux_head.conv.out_channels == 8
    calls = []
    head.aux_head.register_forward_hook(lambda *_: calls.append(1))
    features = {"res4": torch.rand(1, 32, 4, 4), "res5": torch.rand(1, 64, 4, 4)}
    head(features)
    assert not calls


def test_predictors_start_near_zero():
    head = tiny_model("semantic", *OPTS["PSPHead"], HEAD + "CONVS_DIM", 512).sem_seg_head
    assert head.predictor.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.predictor.bias.abs().max() == 0


@pytest.mark.parametrize("name", OURS)
def test_one_image_trains_with_a_batch_norm(name):
    model = tiny_model("semantic", *OPTS[name], HEAD + "NORM", "BN", norm="BN")
    train_step(model, [image_dict(0, semantic=True)])


@pytest.mark.parametrize("name", OURS)
def test_a_synchronised_norm_is_built(name):
    model = tiny_model("semantic", *OPTS[name], HEAD + "NORM", "SyncBN", norm="SyncBN")
    names = [k for k, m in model.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert any(k.startswith("sem_seg_head.aux_head") for k in names)
    train_step(model, [image_dict(0, semantic=True)])  # in one process it is a batch norm
    assert model.eval()([image_dict(0)])[0]["sem_seg"].isfinite().all()


@pytest.mark.parametrize("name", OURS)
def test_it_can_be_copied_and_pickled(name):
    model = tiny_model("semantic", *OPTS[name], training=False)
    with torch.no_grad():
        expected = model([image_dict(0)])[0]["sem_seg"]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin([image_dict(0)])[0]["sem_seg"], expected)


# ---- Losses.


def test_the_mean_is_over_the_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, 5, generator=generator)
    labels = torch.randint(4, (2, 6, 5), generator=generator)
    labels[0, :3] = 255
    expected = F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(mean_cross_entropy(logits, labels, 255), expected)


@pytest.mark.parametrize("kind", ["cross_entropy", "hard_pixel_mining"])
@pytest.mark.parametrize("name", OURS)
def test_without_a_label_the_loss_is_a_connected_zero(name, kind, image_dicts):
    model = tiny_model("semantic", *OPTS[name], HEAD + "LOSS_TYPE", kind)
    for entry in image_dicts:
        entry["sem_seg"].fill_(255)
    losses = model(image_dicts)
    assert [v.item() for v in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() == 0, key


@pytest.mark.parametrize("kind", ["cross_entropy", "hard_pixel_mining"])
def test_weights_scale_the_losses(kind, image_dicts):
    opts = (*OPTS["PSPHead"], HEAD + "LOSS_TYPE", kind, HEAD + "ASPP_DROPOUT", 0.0)
    once = tiny_model("semantic", *opts)(image_dicts)
    twice = tiny_model("semantic", *opts, HEAD + "LOSS_WEIGHT", 2.0, HEAD + "AUX_WEIGHT", 0.1)
    twice = twice(image_dicts)
    assert twice["loss_sem_seg"].item() == pytest.approx(2 * once["loss_sem_seg"].item())
    assert twice["loss_sem_seg_aux"].item() == pytest.approx(once["loss_sem_seg_aux"].item() / 2)


def test_the_hardest_pixels_have_the_larger_loss(image_dicts):
    losses = {}
    for kind in ("cross_entropy", "hard_pixel_mining"):
        model = tiny_model("semantic", *OPTS["PSPHead"], HEAD + "LOSS_TYPE", kind)
        losses[kind] = model(image_dicts[:1])["loss_sem_seg"].item()
    assert losses["hard_pixel_mining"] > losses["cross_entropy"]


@pytest.mark.parametrize("name", OURS)
def test_losses_are_computed_in_single_precision(name, image_dicts):
    model = tiny_model("semantic", *OPTS[name])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(image_dicts)
    assert all(v.dtype is torch.float32 and v.isfinite() for v in losses.values())


# ---- Training, plain and distilled.


@pytest.mark.parametrize("kind", ["cross_entropy", "hard_pixel_mining"])
@pytest.mark.parametrize("name", OPTS)
def test_a_step_of_training(name, kind, image_dicts):
    model = tiny_model("semantic", *OPTS[name], HEAD + "LOSS_TYPE", kind)
    losses = train_step(model, image_dicts)
    assert losses["loss_sem_seg"] > 0
    assert ("loss_sem_seg_aux" in losses) == (name in OURS)


@pytest.mark.parametrize("teacher", OPTS)
@pytest.mark.parametrize("student", OPTS)
def test_a_step_of_distillation_from_another_output_stride(student, teacher, image_dicts):
    opts = (*OPTS[teacher], *OUTPUT_STRIDE_16)
    if teacher == "DeepLabV3Head":
        opts += (HEAD + "COMMON_STRIDE", 16)
    model = distilled(
        "semantic",
        ["FitNet", "IMA"],
        student=outspoken_model("semantic", *OPTS[student]),
        teacher=outspoken_model("semantic", *opts, seed=1),
    )
    losses = train_step(model, image_dicts)
    assert any(v > 0 for k, v in losses.items() if k.startswith("loss_ima"))
    assert not any(k.startswith("teacher") for k in model.state_dict())


@pytest.mark.parametrize("name", OPTS)
def test_a_copy_teaches_nothing(name, image_dicts):
    losses = kd_losses(distilled_from_itself("semantic", ["FitNet"], *OPTS[name]), image_dicts)
    assert set(losses) == {"loss_fitnet/res2", "loss_fitnet/res4", "loss_fitnet/res5"}
    assert all(v.item() == 0 for v in losses.values())


@pytest.mark.parametrize("kind", ["cross_entropy", "hard_pixel_mining"])
@pytest.mark.parametrize("name", OPTS)
def test_a_teachers_head_is_asked_up_to_its_predictor(name, kind):
    model = tiny_model("semantic", *OPTS[name], HEAD + "LOSS_TYPE", kind, training=False)
    head, family = model.sem_seg_head, build_family(model)
    forwards = []
    head.register_forward_hook(lambda *_: forwards.append(1))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        outputs = family.ask(images, NetworkOutputs(batch=None), {"sem_seg"})
        assert not forwards
        expected = head(model.backbone(images))[0]
    said = outputs.sem_seg
    assert torch.equal(head.predictor(said.features), said.logits)
    scaled = F.interpolate(said.logits, scale_factor=head.common_stride, mode="bilinear")
    torch.testing.assert_close(scaled, expected)
    assert family.num_classes == said.logits.shape[1] == 4


# ---- Config.


def test_detectron2s_deeplab_keys_have_its_defaults():
    plain, ours = get_cfg(), tiny_cfg("semantic")
    add_nets_config(plain)
    for key in ("LOSS_TYPE", "ASPP_CHANNELS", "ASPP_DILATIONS", "PROJECT_CHANNELS", "AUX_WEIGHT"):
        assert ours.MODEL.SEM_SEG_HEAD[key] == plain.MODEL.SEM_SEG_HEAD[key]
    assert "AUX_WEIGHT" not in get_cfg().MODEL.SEM_SEG_HEAD


@pytest.mark.parametrize("name", OPTS)
def test_the_students_config_has_the_keys_that_it_reads(name, tmp_path):
    cfg = student_config(tiny_cfg("semantic", *OPTS[name]))
    write_config(cfg, tmp_path / "student.yaml")
    plain = get_cfg()
    add_nets_config(plain)
    plain.merge_from_file(str(tmp_path / "student.yaml"))
    assert build_model(plain).state_dict().keys() == build_model(cfg).state_dict().keys()


def test_the_config_of_another_student_has_none_of_them():
    cfg = student_config(tiny_cfg("semantic"))
    assert "AUX_WEIGHT" not in cfg.MODEL.SEM_SEG_HEAD and "STEM_TYPE" not in cfg.MODEL.RESNETS


BAD_VALUES = {
    "RES4_DILATION 3": ((RESNET + "RES4_DILATION", 3), ["RES4_DILATION is 3", "1 or 2"]),
    "RES5_DILATION 3": ((RESNET + "RES5_DILATION", 3), ["RES5_DILATION is 3", "1, 2 or 4"]),
    "RES5 after RES4": ((RESNET + "RES5_DILATION", 2), ["RES5_DILATION is 2", "must be 4"]),
    "multi-grid": ((RESNET + "RES5_MULTI_GRID", [1, 2]), ["RES5_MULTI_GRID", "three"]),
    "stem": ((RESNET + "STEM_TYPE", "deep"), ["STEM_TYPE", "'deep'", "basic"]),
    "loss": ((HEAD + "LOSS_TYPE", "focal"), ["LOSS_TYPE", "hard_pixel_mining"]),
    "dilations": ((HEAD + "ASPP_DILATIONS", [6, 0, 18]), ["ASPP_DILATIONS", "three"]),
    "channels": ((HEAD + "ASPP_CHANNELS", 0), ["ASPP_CHANNELS is 0"]),
    "project": ((HEAD + "PROJECT_CHANNELS", [0]), ["PROJECT_CHANNELS"]),
    "dropout": ((HEAD + "ASPP_DROPOUT", 1.0), ["ASPP_DROPOUT is 1.0", "[0, 1)"]),
    "aux": ((HEAD + "AUX_WEIGHT", -1.0), ["AUX_WEIGHT is -1.0", "at least 0"]),
    "power": (("SOLVER.POLY_LR_POWER", -1.0), ["POLY_LR_POWER is -1.0"]),
    "ending": (("SOLVER.POLY_LR_CONSTANT_ENDING", 2.0), ["CONSTANT_ENDING is 2.0", "[0, 1]"]),
    "area": (("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.0), ["MAX_AREA is 0.0", "(0, 1]"]),
    "V3's channels": ((HEAD + "CONVS_DIM", 16), ["CONVS_DIM is 16", "ASPP_CHANNELS 8"]),
    "V3's stride": ((HEAD + "COMMON_STRIDE", 16), ["COMMON_STRIDE is 16", "output stride"]),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_one_sentence(name):
    opts, words = BAD_VALUES[name]
    with pytest.raises(ConfigError) as e:
        check_values(tiny_cfg("semantic", *OPTS["DeepLabV3Head"], *opts))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", OPTS)
def test_good_values_pass(name):
    cfg = tiny_cfg("semantic", *OPTS[name], "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR")
    validate_config(cfg, training=False)


@pytest.mark.parametrize(
    "opts, words",
    [
        ((HEAD + "AUX_IN_FEATURE", "res3"), ["AUX_IN_FEATURE is res3", "'res4'"]),
        ((HEAD + "IN_FEATURES", ["p2"]), ["IN_FEATURES is ['p2']", "'res5'"]),
        ((HEAD + "IN_FEATURES", ["res4", "res5"]), ["IN_FEATURES", "PSPHead reads one"]),
        ((HEAD + "LOSS_TYPE", "focal"), ["LOSS_TYPE is focal", "cross_entropy"]),
    ],
)
def test_a_head_that_cannot_be_built_is_one_sentence(opts, words):
    with pytest.raises(ConfigError) as e, building("student"):
        build_model(tiny_cfg("semantic", *OPTS["PSPHead"], *opts))
    assert all(word in str(e.value) for word in words)


@pytest.mark.parametrize("ending", [0.0, 0.25])
def test_the_polynomial_schedule(ending):
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.POLY_LR_POWER", 1.0)
    opts += ("SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 1.0)
    cfg = tiny_cfg("semantic", *opts, "SOLVER.POLY_LR_CONSTANT_ENDING", ending)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(6):  # two steps more than MAX_ITER
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25, ending, ending])


@pytest.mark.e2e
def test_the_polynomial_schedule_goes_on_in_a_longer_training(shapes, tmp_path):
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.POLY_LR_POWER", 1.0)
    rates = {}
    for length, resume in ((2, False), (4, True)):
        cfg = trainable_cfg("faster", shapes, tmp_path, *opts, "SOLVER.MAX_ITER", length)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume)
        trainer.train()
        rates[length] = [x for x, _ in trainer.storage.history("lr").values()]
    assert rates[2] == pytest.approx([0.01, 0.005])
    assert rates[4][1] == pytest.approx(0.0025)  # rates[4][0] is restored
