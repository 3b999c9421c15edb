"""CSPNeXt and its PAFPN, the backbone of RTMDet (Lyu et al., "RTMDet: an empirical study of
designing real-time object detectors", Sec. 3.1).

    build_cspnext_pafpn_backbone     with the neck: p3, p4, p5 of equal channels, 256 · width
    build_cspnext_backbone           without it: c3, c4, c5

Both read ``MODEL.CSPNEXT``. ``DEPTH`` and ``WIDTH`` are 0.167 and 0.375 (tiny), 0.33 and 0.5 (s),
0.67 and 0.75 (m), 1 and 1 (l), or 1.33 and 1.25 (x). A block has a separable 5x5 convolution.
Only the backbone has channel attention.

The outputs of the bottom-up pathway before the neck's last convolutions are o3, o4 and o5. They
have as many channels as c3, c4 and c5, their shallow maps. The neck's last convolutions before
norm and activation are conv_p3, conv_p4 and conv_p5. MMYOLO compares these in the distillation of
RTMDet. Methods compare maps of both kinds only if their ``IN_FEATURES`` names them.

The batch norms have PyTorch's own ε and momentum. The authors' classes default to 0.001 and 0.03,
but each of their configs replaces these.
"""

from .blocks import conv, csp, down, large_kernel, sppf
from .csp_pan import DEEP, CSPNetwork, pan_table
from .graph import Layer

_CSP = csp(large_kernel, attention=True)
_LAST_CSP = csp(large_kernel, residual=False, attention=True)
_NECK_CSP = csp(large_kernel, residual=False)
_DEEP = ("o3", "o4", "o5")

CSPNEXT = CSPNetwork(
    name="cspnext",
    section="CSPNEXT",
    bottom_up=(
        Layer("stem1", conv(3, stride=2), 32),
        Layer("stem2", conv(3), 32),
        Layer("c1", conv(3), 64),
        Layer("down1", down, 128),
        Layer("c2", _CSP, 128, 3),
        Layer("down2", down, 256),
        Layer("c3", _CSP, 256, 6),
        Layer("down3", down, 512),
        Layer("c4", _CSP, 512, 6),
        Layer("down4", down, 1024),
        Layer("spp", sppf, 1024),
        Layer("c5", _LAST_CSP, 1024, 3),
    ),
    neck=(
        *pan_table(_NECK_CSP, _DEEP),
        Layer("p3", conv(3), 256, inputs=("o3",)),
        Layer("p4", conv(3), 256, inputs=("o4",)),
        Layer("p5", conv(3), 256, inputs=("o5",)),
    ),
    deep=_DEEP,
    exposed=DEEP,
    eps=1e-5,
    momentum=0.1,
).register()
