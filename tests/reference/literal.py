"""References of the papers' equations in NumPy float64, written term by term.

They are slow and obvious on purpose. They loop over images, boxes, points, channels and cells,
transform with the full complex mask, and suppress boxes by definition. They follow the papers
and the choices that the docstrings of the package state. They share no code with the package.
"""

import math
from fractions import Fraction
from math import ceil, exp, hypot

import numpy as np
from scipy.special import softmax

EPS = 1e-5  # IMA Eq. 6


def mssd(student, teacher):
    """Return MSSD Eq. 1-3 of one level, without the factor g."""
    return sum((s - t) ** 2 for s, t in zip(student.flat, teacher.flat)) / student.size


def clamped(box):
    """Return (x1, y1, x2, y2, w, h), both sides enlarged to at least one pixel about the centre."""
    x1, y1, x2, y2 = (float(v) for v in box)
    if x2 - x1 < 1:
        x1, x2 = (x1 + x2) / 2 - 0.5, (x1 + x2) / 2 + 0.5
    if y2 - y1 < 1:
        y1, y2 = (y1 + y2) / 2 - 0.5, (y1 + y2) / 2 + 0.5
    return x1, y1, x2, y2, x2 - x1, y2 - y1


def gaussian_mask(boxes, height, width, stride, sigma2=2.0, binary=False):
    """Return MSSD Eq. 5 at the cell centres; one (K, 4) array per image."""
    masks = np.zeros((len(boxes), height, width))
    for mask, image in zip(masks, boxes):
        for box in image:
            x1, y1, x2, y2, w, h = clamped(box)
            xc, yc = (x1 + x2) / 2, (y1 + y2) / 2
            if not (0 <= xc < width * stride and 0 <= yc < height * stride):
                continue
            covers_none = True
            for i, j in np.ndindex(height, width):
                x, y = (j + 0.5) * stride, (i + 0.5) * stride
                if x1 <= x <= x2 and y1 <= y <= y2:
                    covers_none = False
                    dx, dy = (x - xc) ** 2 / (w / 2) ** 2, (y - yc) ** 2 / (h / 2) ** 2
                    value = 1.0 if binary else exp(-dx / sigma2 - dy / sigma2)
                    mask[i, j] = max(mask[i, j], value)
            if covers_none:
                mask[int(yc // stride), int(xc // stride)] = 1
    return masks


def multi_scale(student, teacher, scales=(1, 2, 4), power=2):
    """Return MKD Eq. 1; the last pooling window of a row or column may be smaller."""
    batch, channels, height, width = student.shape
    total = 0.0
    for k in scales:
        if k > min(height, width):
            continue
        for n, c in np.ndindex(batch, channels):
            squares = 0.0
            for y in range(0, height, k):
                for x in range(0, width, k):
                    pooled_s = student[n, c, y : y + k, x : x + k].mean()
                    pooled_t = teacher[n, c, y : y + k, x : x + k].mean()
                    squares += (pooled_t - pooled_s) ** 2
            distance = squares if power == 2 else math.sqrt(squares + 1e-6)
            total += distance / (height * width)
    return total / (batch * channels)


def channel_normalized(x):
    """Return maps (N, C, H, W) with mean 0 and deviation 1 in each channel over N, H and W."""
    result = np.zeros_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        result[:, c] = (values - values.mean()) / math.sqrt(values.var() + 1e-5)
    return result


def full_mask(half, width):
    """Return the full (H, W) mask from (H, W // 2 + 1), entry by entry: M[k] = M[-k]."""
    height = len(half)
    full = np.empty((height, width))
    for y, x in np.ndindex(height, width):
        full[y, x] = half[y, x] if x <= width // 2 else half[-y % height, width - x]
    return full


def filtered(x, half):
    """Return F⁻¹(M ⊙ F(x)) over the last two dimensions (MKD Eq. 2-3, IMA Eq. 2-3)."""
    result = np.fft.ifft2(full_mask(half, x.shape[-1]) * np.fft.fft2(x))
    assert np.abs(result.imag).max(initial=0) <= 1e-9 * (1 + np.abs(x).max(initial=0))
    return result.real


def frequency_masked_mse(student, teacher, mask):
    """Return MKD Eq. 4."""
    gaps = [filtered(s, m[0]) - t for s, t, m in zip(student, teacher, mask)]
    return np.mean(np.square(gaps))


def joint_attention(student, teacher, tau=0.5):
    """Return MKD's A of one image, (H, W), with maximum 1."""
    both = 0.0
    for x in (student, teacher):
        strength = np.abs(x).mean(axis=0)
        both = both + strength.size * softmax(strength / tau)
    return both / both.max()


def channel_alignment(student, teacher, temperature=1.0, attention=True):
    """Return MKD Eq. 5."""
    batch, channels = student.shape[:2]
    total = 0.0
    for s, t in zip(student, teacher):
        a = joint_attention(s, t) if attention else 1.0
        for c in range(channels):
            p = softmax((a * t[c]).ravel() / temperature)
            q = softmax((a * s[c]).ravel() / temperature)
            total += temperature**2 / channels * np.sum(p * np.log(p / q))
    return total / batch


def standardized(x, by=None):
    """Return IMA Eq. 5-7 of one instance, (C, cells), by its own statistics or those of ``by``."""
    by = x if by is None else by
    return (x - by.mean(1, keepdims=True)) / np.sqrt(by.var(1, keepdims=True) + EPS)


def cosine_similarity(a, b):
    """Return IMA Eq. 8; 0 where one of the maps is zero."""
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return (a * b).sum() / norm if norm > 0 else 0.0


def ima_classes(
    student,
    teacher,
    labels,
    num_classes,
    mask=None,
    standardize=True,
    standardize_teacher=True,
    deflate=True,
    scale_on="standardized",
    scale_floor=0.1,
    scales=None,
    statistics="instance",
):
    """Return the sum over instances and their α: IMA Eq. 1-10, one instance per class and image.

    ``scales`` replaces the computed α.
    """
    total, used = 0.0, []
    for n in range(len(student)):
        filtered_student = student[n] if mask is None else filtered(student[n], mask[n, 0])
        known = (labels[n] >= 0) & (labels[n] < num_classes)
        for label in range(num_classes):
            cells = labels[n] == label
            if not cells.any():
                continue
            s, t = filtered_student[:, cells], teacher[n][:, cells]
            raw = s, t
            if standardize:
                wholes = (filtered_student[:, known], teacher[n][:, known])
                by = wholes if statistics == "image" else raw
                s = standardized(s, by[0])
                t = standardized(t, by[1]) if standardize_teacher else t
            scale = 1.0
            if deflate:
                cosine = cosine_similarity(*(raw if scale_on == "raw" else (s, t)))
                scale = scale_floor + (1 - scale_floor) * np.clip(cosine, 0, 1)
            if scales is not None:
                scale = scales[len(used)]
            used.append(scale)
            total += np.mean((scale * s - t) ** 2)
    return total, used


def box_iou(a, b):
    """Return the intersection over union of two boxes; 0 without a union."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(w, 0.0) * max(h, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def matched_iou(boxes, gt):
    """Return TID's IOU_max, (P,), of (P, A, 4) decoded boxes."""
    return np.array(
        [max((box_iou(a, g) for a in anchors for g in gt), default=0.0) for anchors in boxes]
    )


def tid_score(iou, prob, positive, negative, top=0.025, parts="both", raw_iou=False):
    """Return TID's Score of the points of one image (DIEM)."""
    k = ceil(Fraction(str(top)) * len(prob))
    best = sorted(range(len(prob)), key=lambda i: (-prob[i], -iou[i], i))[:k]
    scores = []
    for i, (u, p) in enumerate(zip(iou, prob)):
        score_c = 1.5 if i in best and p > 0 else 1.0
        if raw_iou:
            score_r = u
        elif u >= positive:
            score_r = 2.0
        elif u > negative:
            score_r = 1.5
        else:
            score_r = 0.4
        scores.append({"both": score_c * score_r, "cls": score_c, "reg": score_r}[parts])
    return np.array(scores)


def tid_value(score_t, score_s, tie, boxes, gamma=0.05, nms_iou=0.6, area="both", out="keep"):
    """Return TID's Value_output of the points of one image (LDAM)."""
    points = range(len(score_t))
    k = ceil(Fraction(str(gamma)) * len(points))
    key = sorted(points, key=lambda i: (-score_t[i], -tie[i], i))[:k]
    gain = [score_t[i] - score_s[i] for i in points]
    candidates = sorted((i for i in points if gain[i] > 0), key=lambda i: (-gain[i], -tie[i], i))
    weak: list[int] = []
    for i in candidates[:2000]:
        if len(weak) < k and all(box_iou(boxes[i], boxes[j]) <= nms_iou for j in weak):
            weak.append(i)
    value = np.zeros(len(points))
    for i in points:
        outside = min(score_t[i], 1.0) if out == "keep" else 0.0
        score_key = score_t[i] if i in key else outside
        score_weak = 1.5 if i in weak else 1.0
        value[i] = {"both": score_key * score_weak, "key": score_key, "weak": score_weak}[area]
    return value


def tid_information(points, boxes):
    """Return TID's V_information of (P, 2) points (SFDM)."""
    value = np.zeros(len(points))
    for p, (x, y) in enumerate(points):
        for box in boxes:
            x1, y1, x2, y2 = box
            w, h = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
            dx, dy = max(x1 - x, x - x2, 0.0), max(y1 - y, y - y2, 0.0)
            value[p] = max(value[p], 1 - hypot(dx / (w / 2), dy / (h / 2)))
    return value


def tid_mask(value):
    """Return TID's M (SFDM)."""
    return np.array([v if v >= 1 else 0.7 * v if v >= 0.01 else 0.05 * v for v in value])


def tid_by_value(value, high, medium, low):
    """Return α of each point (SFDM), by the area that it belongs to."""
    return np.array([high if v >= 1 else medium if v >= 0.01 else low for v in value])


def tid(student, teacher, mask, alpha=None):
    """Return TID's L_fea: (Σ α M (T - S)² / C, Σ M)."""
    batch, channels, height, width = student.shape
    total = mass = 0.0
    for n, i, j in np.ndindex(batch, height, width):
        mass += mask[n, i, j]
        weight = mask[n, i, j] * (1.0 if alpha is None else alpha[n, i, j])
        for c in range(channels):
            total += weight * (teacher[n, c, i, j] - student[n, c, i, j]) ** 2 / channels
    return total, mass
