"""Small scenes in the published files of SUN RGB-D, for tests of the reader and of the task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH, FOCAL = 48, 64, 40.0
# Centre, half lengths, heading, class: a bed, a chair and a table on a floor at z = -1.
BOXES = np.array(
    [
        [-1.0, 3.5, -0.6, 0.8, 0.6, 0.4, 0.4, 0],
        [0.9, 2.6, -0.6, 0.3, 0.3, 0.4, -1.2, 3],
        [0.9, 4.6, -0.65, 0.4, 0.6, 0.35, 2.8, 1],
    ]
)


def local(points, box):
    """Points (N, 3) in the frame of a box: l, w, h."""
    cosine, sine = np.cos(box[6]), np.sin(box[6])
    axes = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return (points - box[:3]) @ axes.T


def make_points(boxes, count, generator):
    """Two thirds of the points on the faces of boxes, the others on the floor: (count, 3)."""
    each = 0 if len(boxes) == 0 else 2 * count // (3 * len(boxes))
    parts = []
    for box in boxes:
        surface = generator.uniform(-0.99, 0.99, (each, 3))
        surface[np.arange(each), np.arange(each) % 3] = generator.choice([-0.99, 0.99], each)
        surface *= box[3:6]
        cosine, sine = np.cos(box[6]), np.sin(box[6])
        parts.append(
            surface @ np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) + box[:3]
        )
    rest = count - each * len(boxes)
    floor = np.stack(
        [generator.uniform(-1, 1, rest), generator.uniform(2, 6, rest), np.full(rest, -1.01)], 1
    )
    return np.concatenate([*parts, floor])


def write_scene(
    root: Path, name: str, folder: str = "votenet_v1", boxes=BOXES, count: int = 600, seed: int = 0
) -> None:
    """Write the five files of a scene below a data folder."""
    generator = np.random.default_rng(seed)
    points = make_points(boxes, count, generator)
    colors = np.tile([0.5, 0.4, 0.3], (count, 1))
    votes = np.zeros((count, 10))
    filled = np.zeros(count, dtype=int)
    for box in boxes:
        inside = (np.abs(local(points, box)) <= box[3:6]).all(axis=1)
        colors[inside] = np.eye(3)[int(box[7]) % 3]
        votes[inside, 0] = 1
        offsets = box[:3] - points[inside]
        for row, offset in zip(np.flatnonzero(inside), offsets, strict=True):
            first = 1 + 3 * min(filled[row], 2)
            votes[row, first : first + 3] = offset
            if filled[row] == 0:
                votes[row, 4:] = np.tile(offset, 2)
            filled[row] += 1
    shots = root / "sunrgbd_trainval"
    for path in (root / folder, shots / "calib", shots / "image"):
        path.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        root / folder / f"{name}_pc.npz", pc=np.hstack([points, colors]).astype(np.float32)
    )
    np.savez_compressed(root / folder / f"{name}_votes.npz", point_votes=votes)
    np.save(root / folder / f"{name}_bbox.npy", boxes)

    (shots / "calib" / f"{name}.txt").write_text(
        f"1 0 0 0 1 0 0 0 1\n{FOCAL} 0 0 0 {FOCAL} 0 {WIDTH / 2} {HEIGHT / 2} 1\n"
    )
    # Each point paints a patch: x right, z up, y into the image.
    image = np.full((HEIGHT, WIDTH, 3), 230, dtype=np.uint8)
    order = np.argsort(-points[:, 1])
    u = np.round(FOCAL * points[:, 0] / points[:, 1] + WIDTH / 2).astype(int)
    v = np.round(-FOCAL * points[:, 2] / points[:, 1] + HEIGHT / 2).astype(int)
    for row in order:
        image[max(v[row] - 1, 0) : v[row] + 2, max(u[row] - 1, 0) : u[row] + 2] = 255 * colors[row]
    Image.fromarray(image).save(shots / "image" / f"{name}.jpg", quality=95)
