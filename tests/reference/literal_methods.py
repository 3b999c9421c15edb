"""References of the published comparison methods in NumPy float64, written term by term.

They are slow and obvious on purpose: loops over images, channels, cells, anchors and boxes. They
follow the formulas only and share no code with the package. Maps are (N, C, H, W), boxes (K, 4)
XYXY. A term does not include its method's weight unless its docstring says so.
"""

from math import ceil, floor, log2, sqrt

import numpy as np
from scipy.special import expit, log_softmax, logsumexp, softmax


def kl(p, q):
    """Return KL(softmax(p) || softmax(q)) of two vectors of logits."""
    log_p, log_q = log_softmax(p), log_softmax(q)
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def bce(logit, target):
    """Return the binary cross-entropy of σ(logit) against a soft target, element by element."""
    return target * np.logaddexp(0, -logit) + (1 - target) * np.logaddexp(0, logit)


def spatial_attention(image, temperature):
    """Return HW · softmax over the cells of mean_c |x| / T, of one (C, H, W) image."""
    strength = np.abs(image).mean(axis=0)
    return strength.size * softmax(strength / temperature)


def channel_attention(image, temperature):
    """Return C · softmax over the channels of mean_hw |x| / T, of one (C, H, W) image."""
    strength = np.abs(image).mean(axis=(1, 2))
    return strength.size * softmax(strength / temperature)


def fitnet(student, teacher):
    """FitNets: the mean squared error."""
    return float(np.mean([(s - t) ** 2 for s, t in zip(student.flat, teacher.flat)]))


def pkd_standardized(x):
    """PKD's map: each channel to mean 0 and (unbiased) deviation 1 over images and cells."""
    result = np.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        std = values.std(ddof=1) if values.size > 1 else 0.0
        result[:, c] = (values - values.mean()) / (std + 1e-6)
    return result


def pkd(student, teacher):
    """PKD of one level: half the mean squared error of the standardized maps."""
    return 0.5 * fitnet(pkd_standardized(student), pkd_standardized(teacher))


def cwd(student, teacher, temperature):
    """CWD: T² · KL(teacher || student) of each channel's distribution, mean over N and C."""
    batch, channels = student.shape[:2]
    total = 0.0
    for n, c in np.ndindex(batch, channels):
        total += kl(teacher[n, c].ravel() / temperature, student[n, c].ravel() / temperature)
    return temperature**2 * total / (batch * channels)


def fgd_masks(boxes, padded_size, height, width):
    """FGD's foreground and background masks of one image."""
    foreground = np.zeros((height, width))
    for x1, y1, x2, y2 in boxes:
        left, right = floor(x1 * width / padded_size[1]), ceil(x2 * width / padded_size[1])
        top, bottom = floor(y1 * height / padded_size[0]), ceil(y2 * height / padded_size[0])
        area = (bottom + 1 - top) * (right + 1 - left)
        for i, j in np.ndindex(height, width):
            if top <= i <= bottom and left <= j <= right:
                foreground[i, j] = max(foreground[i, j], 1 / area)
    background = np.where(foreground == 0, 1.0, 0.0)
    if background.sum() > 0:
        background = background / background.sum()
    return foreground, background


def fgd(student, teacher, boxes, padded_size, temperature):
    """FGD's focal terms without α, β, γ: (foreground, background, attention)."""
    batch, channels, height, width = student.shape
    foreground = background = attention = 0.0
    for s, t, image_boxes in zip(student, teacher, boxes):
        m_fg, m_bg = fgd_masks(image_boxes, padded_size, height, width)
        space_s, space_t = spatial_attention(s, temperature), spatial_attention(t, temperature)
        channel_s, channel_t = channel_attention(s, temperature), channel_attention(t, temperature)
        for c, i, j in np.ndindex(channels, height, width):
            gap = space_t[i, j] * channel_t[c] * (s[c, i, j] - t[c, i, j]) ** 2
            foreground += m_fg[i, j] * gap
            background += m_bg[i, j] * gap
        attention += np.abs(channel_s - channel_t).sum() + np.abs(space_s - space_t).sum()
    return float(foreground / batch), float(background / batch), float(attention / batch)


def fgd_relation(student, teacher):
    """FGD's global term without λ, of the maps after their context blocks."""
    return float(sum((s - t) ** 2 for s, t in zip(student.flat, teacher.flat)) / len(student))


def mgd(student, teacher, generator, keep):
    """MGD without α: the teacher's map is generated from the kept cells of the student."""
    generated = generator(keep * student)
    return float(sum((g - t) ** 2 for g, t in zip(generated.flat, teacher.flat)) / len(teacher))


def pixel_iou(a, b):
    """Return the IoU of boxes that include their last pixel (sides x2 - x1 + 1)."""
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if w <= 0 or h <= 0:
        return 0.0
    area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
    area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    return w * h / (area_a + area_b - w * h)


def fgfi_mask(anchors, boxes, threshold):
    """FGFI's mask of one image: cells with an anchor near enough to a box's best anchor."""
    height, width, per_cell = anchors.shape[:3]
    mask = np.zeros((height, width), dtype=bool)
    for box in boxes:
        iou = np.zeros((height, width, per_cell))
        for i, j, a in np.ndindex(height, width, per_cell):
            iou[i, j, a] = pixel_iou(anchors[i, j, a], box)
        best = iou.max(initial=0.0)
        if best <= 0:
            continue
        for i, j, a in np.ndindex(height, width, per_cell):
            if iou[i, j, a] > threshold * best:
                mask[i, j] = True
    return mask


def fgfi(student, teacher, mask):
    """FGFI: Σ M (t - s)² / (2 Σ M), summed over channels; 0 for an empty mask."""
    cells = total = 0.0
    for n, i, j in np.ndindex(mask.shape):
        if mask[n, i, j]:
            cells += 1
            total += np.sum((teacher[n, :, i, j] - student[n, :, i, j]) ** 2)
    return float(total / (2 * cells)) if cells > 0 else 0.0


def defeat_level(box, levels):
    """Return the level that DeFeat assigns a box to, 0 the finest."""
    x1, y1, x2, y2 = (float(v) for v in box)
    level = floor(log2(sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) / 56 + 1e-6))
    return min(max(level, 0), levels - 1)


def defeat_mask(boxes, height, width, stride, level, levels):
    """DeFeat's 'mask-neck-gt' of one image on one level."""
    mask = np.zeros((height, width))
    for box in boxes:
        if defeat_level(box, levels) != level:
            continue
        left, top, right, bottom = (int(v / stride) for v in box)
        if right <= left or bottom <= top:
            right, bottom = left + 1, top + 1
        for i, j in np.ndindex(height, width):
            if top <= i < bottom and left <= j < right:
                mask[i, j] = 1.0
    return mask


def defeat(student, teacher, mask):
    """DeFeat's neck terms of one level without weights: (foreground, background)."""
    result = []
    for part in (mask, 1 - mask):
        total = count = 0.0
        for n, c, i, j in np.ndindex(student.shape):
            total += part[n, i, j] * (student[n, c, i, j] - teacher[n, c, i, j]) ** 2
            count += part[n, i, j]
        result.append(float(total / max(1.0, 2 * count)))
    return result[0], result[1]


def frs(student, teacher, score):
    """FRS's feature term of one level: Σ M (t - s)² / Σ M, summed over channels."""
    total = mass = 0.0
    for n, i, j in np.ndindex(score.shape):
        total += score[n, i, j] * np.sum((teacher[n, :, i, j] - student[n, :, i, j]) ** 2)
        mass += score[n, i, j]
    return float(total / mass) if mass > 0 else 0.0


def frs_classes(student_logits, teacher_logits, score):
    """FRS's class term of one level: Σ M BCE(σ(s), σ(t)) / Σ M, summed over the logits."""
    total = mass = 0.0
    for n, i, j in np.ndindex(score.shape):
        target = expit(teacher_logits[n, :, i, j])
        total += score[n, i, j] * bce(student_logits[n, :, i, j], target).sum()
        mass += score[n, i, j]
    return float(total / mass) if mass > 0 else 0.0


def kd(student, teacher, temperature):
    """Hinton's KD: T² · mean over N of KL(teacher || student) at temperature T."""
    total = sum(kl(t / temperature, s / temperature) for s, t in zip(student, teacher))
    return temperature**2 * total / len(student)


def dkd(student, teacher, target, alpha, beta, temperature):
    """DKD: T² · mean over N of α TCKD + β NCKD."""
    total = 0.0
    for s, t, label in zip(student, teacher, target):
        others = [k for k in range(len(s)) if k != label]
        if not others:
            continue  # p = q = 1: both parts are 0
        s, t = s / temperature, t / temperature
        tckd = kl([t[label], logsumexp(t[others])], [s[label], logsumexp(s[others])])
        nckd = kl(t[others], s[others])
        total += alpha * tckd + beta * nckd
    return temperature**2 * total / len(student)


def ld(student, teacher, weight, temperature):
    """LD without its factor: Σ w · T² · mean over bins of q (log q - log p), q the teacher's."""
    total = 0.0
    for s, t, w in zip(student, teacher, weight):
        total += w * temperature**2 * kl(t / temperature, s / temperature) / len(s)
    return float(total)


def overlap(a, b):
    """Return (area of a, area of b, area of their intersection)."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return area_a, area_b, max(w, 0.0) * max(h, 0.0)


def plain_iou(a, b):
    """Return the intersection over union; 0 without a union."""
    area_a, area_b, both = overlap(a, b)
    union = area_a + area_b - both
    return both / union if union > 0 else 0.0


def squared_distance(a, b):
    """Return ρ², the squared distance of the centres of two boxes."""
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    return dx**2 + dy**2


def distance_iou(anchor, box, true_diou):
    """LD's d: IoU - ρ²/c², or the released form with the anchor's area in place of the union."""
    if true_diou:
        ratio = plain_iou(anchor, box)
    else:
        area, _, both = overlap(anchor, box)
        ratio = both / area if area > 0 else 0.0
    w = max(anchor[2], box[2]) - min(anchor[0], box[0])
    h = max(anchor[3], box[3]) - min(anchor[1], box[1])
    diagonal2 = w**2 + h**2
    return ratio - (squared_distance(anchor, box) / diagonal2 if diagonal2 > 0 else 0.0)


def atss_threshold(anchors, box, candidates):
    """Return mean plus unbiased deviation of the IoUs of a box's candidates of all levels."""
    ious = []
    for level in anchors:
        distances = [squared_distance(anchor, box) for anchor in level]
        order = np.argsort(distances, kind="stable")
        ious += [plain_iou(level[r], box) for r in order[:candidates]]
    return np.mean(ious) + (np.std(ious, ddof=1) if len(ious) > 1 else 0.0)


def vlr(anchors, boxes, candidates, true_diou):
    """LD's valuable localization region of one image: the weight of every anchor, (R,)."""
    everywhere = [anchor for level in anchors for anchor in level]
    weight = np.zeros(len(everywhere))
    if not everywhere:
        return weight
    for box in boxes:
        threshold = atss_threshold(anchors, box, candidates)
        for r, anchor in enumerate(everywhere):
            if 0.25 * threshold <= distance_iou(anchor, box, true_diou) < threshold:
                weight[r] = max(weight[r], plain_iou(anchor, box))
    return weight


def adaptive_average(x, bins):
    """Adaptive average pooling to bins × bins; neighbouring bins may share a cell."""
    batch, channels, height, width = x.shape
    result = np.empty((batch, channels, bins, bins))
    for n, c, i, j in np.ndindex(result.shape):
        top, bottom = i * height // bins, -(-(i + 1) * height // bins)
        left, right = j * width // bins, -(-(j + 1) * width // bins)
        result[n, c, i, j] = x[n, c, top:bottom, left:right].mean()
    return result


def hcl(students, teachers):
    """ReviewKD's hierarchical context loss, summed over levels."""
    total = 0.0
    for s, t in zip(students, teachers):
        level = fitnet(s, t)
        factor = factors = 1.0
        for bins in (4, 2, 1):
            if bins < s.shape[2]:
                factor /= 2
                factors += factor
                level += factor * fitnet(adaptive_average(s, bins), adaptive_average(t, bins))
        total += level / factors
    return float(total)


def gid_distances(features):
    """GID's distances between the rows, divided by the mean of the positive ones."""
    count = len(features)
    distance = np.zeros((count, count))
    for i, j in np.ndindex(count, count):
        if i != j:
            distance[i, j] = sqrt(max(np.sum((features[i] - features[j]) ** 2), 1e-12))
    return distance / distance[distance > 0].mean()


def gid_relation(student, teacher):
    """GID's relation term without weight; 0 for fewer than three instances."""
    count = len(student)
    if count < 3:
        return 0.0
    total = 0.0
    for s, t in zip(gid_distances(student).flat, gid_distances(teacher).flat):
        gap = abs(s - t)
        total += 0.5 * gap**2 if gap < 1 else gap - 0.5
    return float(total / (count**2 - count))


def gid_feature(student, teacher):
    """GID's feature term without weight, of (R, C, 10, 10) RoI features; 0 without a RoI."""
    total = sum((s - t) ** 2 for s, t in zip(student.flat, teacher.flat))
    return float(total / (len(student) * 100)) if len(student) else 0.0


def fkd_attention(student, teacher, temperature):
    """FKD's feature term without its factor: the root of Σ M (t - s)²."""
    total = 0.0
    for s, t in zip(student, teacher):
        mask = (spatial_attention(s, temperature) + spatial_attention(t, temperature)) / 2
        for c in range(len(s)):
            total += np.sum(mask * (t[c] - s[c]) ** 2)
    return sqrt(total)


def crosskd_classes(reused, teacher, avg_factor):
    """CrossKD's class term: Σ BCE(r, σ(t)) · |σ(r) - σ(t)| / avg_factor."""
    total = 0.0
    for r, t in zip(reused, teacher):
        target = expit(t)
        total += np.sum(bce(r, target) * np.abs(expit(r) - target))
    return float(total / avg_factor)


def crosskd_bins(reused, teacher, weight):
    """CrossKD's term of GFL's edges without its factor; 0 if the weights sum to 0."""
    total = mass = 0.0
    for r, t, u in zip(reused, teacher, weight):
        mass += u
        for edge in range(4):
            total += u * kl(t[edge], r[edge]) / 4
    return float(total / mass) if mass > 0 else 0.0


def instance_normalized(x):
    """Normalize each channel of each image to mean 0 and (biased, ε = 1e-5) variance 1."""
    result = np.empty_like(x)
    for n, c in np.ndindex(x.shape[:2]):
        result[n, c] = (x[n, c] - x[n, c].mean()) / sqrt(x[n, c].var() + 1e-5)
    return result


def lgd(student, teacher):
    """LGD's distillation term: mean squared gap of the normalized maps over all levels."""
    gaps = []
    for s, t in zip(student, teacher):
        gaps.extend(((instance_normalized(s) - instance_normalized(t)) ** 2).flat)
    return float(np.mean(gaps))


def maskd_detection(student, teacher, masks, weights):
    """MasKD's detection term of one level: a mask enters squared, over its sum plus 1e-5."""
    total = 0.0
    for s, t, image_masks, image_weights in zip(student, teacher, masks, weights):
        for mask, w in zip(image_masks, image_weights):
            for c in range(len(s)):
                ratio = np.sum(mask**2 * (s[c] - t[c]) ** 2) / (np.sum(mask) + 1e-5)
                total += w * ratio / len(s)
    return float(total / len(student))
