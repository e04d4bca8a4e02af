"""The body of the phantom: its structures with position, density (HU) and label.

Structures are painted from the skin inwards, each over the earlier ones (see `painting` for coordinates and
distances). Numbers are mm and HU of a body of average size; a random generator varies them from body to body.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hyspark.data.synthetic.painting import Scan, rotation

HALF_HEIGHT = 160.0  # mm, of the trunk shown
LABELS: dict[str, int] = {
    "background": 0,
    "liver": 1,
    "spleen": 2,
    "right_kidney": 3,
    "left_kidney": 4,
    "aorta": 5,
    "spine": 6,
    "right_lung": 7,
    "left_lung": 8,
}


def draw_body(scan: Scan, rng: np.random.Generator) -> None:
    """Paint all structures, the outermost first."""
    x, y, z = scan.x, scan.y, scan.z
    contrast = rng.uniform(0.3, 1)  # how much contrast medium has arrived
    blood = 50 + rng.uniform(90, 170) * contrast
    muscle = rng.uniform(48, 60)

    # The cavity of chest and belly: a superellipse that changes along z.
    knots = [-170, -110, -50, 10, 70, 130, 180]
    width, depth = (
        np.interp(z, knots, k).astype(np.float32)
        for k in ([116, 110, 109, 116, 119, 114, 104], [72, 71, 73, 79, 82, 78, 70])
    )
    rho = np.hypot(x, y)
    ratio = ((np.abs(x) / width) ** 2.4 + (np.abs(y) / depth) ** 2.4) ** (1 / 2.4) + 1e-6
    cavity = rho - rho / ratio
    angle = np.arctan2(np.abs(x), -y)  # 0 behind, pi in front
    back = np.exp(-((angle / 0.75) ** 2))
    low = 1 / (1 + np.exp((z + 10) / 35))
    wall = 11 + 11 * back + 2 * np.exp(-(((angle - 1.6) / 0.5) ** 2))
    fat = scan.fat * (0.6 + 0.55 * low + 0.25 * back * low - 0.15 * np.exp(-(((angle - 2.2) / 0.4) ** 2)))
    groove = 6 * np.exp(-((x / 14) ** 2)) * (y < 0)
    skin = cavity - wall - fat + groove
    scan.paint(skin, 25)
    scan.paint(skin + 2.2, -105 + 6 * scan.texture)
    scan.paint(cavity - wall + 0.4 * groove, muscle - 5 + 9 * scan.texture)
    spine_y = -44 + 10 * np.sin(-(z + 10) / 62)  # forward in the lumbar part, backward in the chest
    back_muscle = (np.hypot((np.abs(x) - 31) / 29, (y - spine_y + 38) / 19) - 1) * 19
    cavity = np.maximum(cavity, -back_muscle)
    scan.paint(cavity, -92 + 12 * scan.texture)

    # The diaphragm: a dome on each side, higher on the right, falling to the ribs.
    q2 = (np.maximum(np.abs(x) - 58, 0.35 * (58 - np.abs(x))) / 62) ** 2 + ((y - 8) / 80) ** 2
    breath = rng.normal(0, 7)
    dome = (46 + breath + 7 * np.tanh(x / 20) - 78 * q2**1.5 - z) / np.sqrt(1 + 10 * q2**2)  # > 0: below it
    chest, belly = np.maximum(cavity, dome), np.maximum(cavity, -dome)
    scan.paint(np.maximum(np.abs(dome) - 1.5, cavity), muscle)

    draw_ribs(scan, cavity, angle)
    draw_lungs(scan, rng, chest, spine_y, blood)
    draw_heart(scan, rng, chest, blood, muscle)
    draw_gut(scan, rng, belly, contrast)
    draw_organs(scan, rng, belly, contrast, blood)
    draw_spine_and_vessels(scan, rng, skin, spine_y, blood, muscle)
    scan.image += scan.texture * np.where(scan.image > -200, 4, 0)


def levels(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute number (0: T12, upwards positive) and mm above the middle of the nearest vertebra; pitch 24 to 36 mm."""
    pitch = 30 - 0.035 * z
    phase = -np.log(pitch / 30) / 0.035
    number = np.rint(phase)
    return number, (phase - number) * pitch


def draw_ribs(scan: Scan, cavity: np.ndarray, angle: np.ndarray) -> None:
    """Paint ribs, which descend to the front, then rise as cartilage to the breastbone; the lowest two end early."""
    box = scan.box((-150, -120, -70), (150, 120, HALF_HEIGHT + 40))
    cavity, angle, x, z = (a[box] for a in (cavity, angle, scan.x, scan.z))
    bend = np.maximum(angle - 2.35, 0)
    number, above = levels(z + 90 * np.sin(angle / 2) ** 2 - 105 * bend - 6)
    end = np.select([number < 0, number == 0, number == 1], [0.0, 1.1, 1.6], 2.4)
    shell = (np.hypot((cavity - 5) / 3.6, above / 6.5) - 1) * 3.6
    cartilage = np.maximum(shell + 0.3, 50 * (angle - np.where(number > 2, 3.0, end)))
    bone = np.maximum(shell, 50 * (angle - end))
    sternum = np.max([np.abs(cavity - 6) - 5, np.abs(x) - 16, (60 - z), 50 * (1.6 - angle)], axis=0)
    scan.paint(cartilage, 105, box=box)
    for distance in (bone, sternum):
        scan.paint(distance, np.where(distance > -1.8, 480, 170), box=box)


def draw_lungs(scan: Scan, rng: np.random.Generator, chest: np.ndarray, spine_y: np.ndarray, blood: float) -> None:
    """Paint two lungs with a gravity gradient and a branching tree of vessels, and the bronchi."""
    x, y, z = scan.x, scan.y, scan.z
    beside = 9 + 17 * np.exp(-(((y + 8) / 38) ** 2)) + 8 * np.exp(-(((z - 122) / 22) ** 2 + ((y + 5) / 25) ** 2))
    lung = np.max([chest + 1.5, beside - np.abs(x + 3), 26 - np.hypot(x, y - spine_y)], axis=0)
    air = rng.uniform(-870, -790) - 0.5 * y + 14 * scan.texture
    for side, label in ((1, LABELS["right_lung"]), (-1, LABELS["left_lung"])):
        scan.paint(np.maximum(lung, -side * x), air, label)
        hilum = np.array([side * 30, -6, 118])
        for _ in range(20):
            way = rng.normal((0.9 * side, 0, -0.3), (0.7, 1, 1.3))
            way /= np.linalg.norm(way)
            fork = hilum + way * rng.uniform(30, 75)
            twigs = [fork + (way + rng.normal(0, 0.5, 3)) * rng.uniform(20, 50) for _ in range(4)]
            for points in ((hilum, fork), *((fork, tip) for tip in twigs)):
                box, distance = scan.tube(points, (4.2, 2.4) if points[0] is hilum else (2.2, 0.8))
                scan.paint(np.maximum(distance, lung[box] + 2), 0.8 * blood - 20, None, box)
        box, distance = scan.tube([(0, -14, 190), (0, -14, 152), (side * 34.0, -12, 122)], (8, 8, 6))
        scan.paint(distance - 2, 30, box=box)
        scan.paint(distance, -985, box=box)


def draw_heart(scan: Scan, rng: np.random.Generator, chest: np.ndarray, blood: float, muscle: float) -> None:
    """Paint the heart in its fat, two pairs of chambers, and the great vessels above it (not the aorta)."""
    centre = np.array([-18, 24, 88]) + rng.normal(0, 4, 3)
    size = rng.normal(1, 0.06)
    turn = rotation((-20, 20, 35))
    for grow, hu in ((6, -85.0), (0, muscle + 0.35 * (blood - 50))):
        box, distance = scan.blob(centre, size * np.array([52, 37, 40]) + grow, turn)
        scan.paint(np.maximum(distance, chest[box] + 2), hu, box=box)
    for shift, radii in (
        ((-15, 4, -6), (22, 14, 17)),
        ((12, 17, -4), (19, 13, 20)),
        ((22, -6, 10), (17, 15, 18)),
    ):
        box, distance = scan.blob(centre + shift, radii, turn)
        scan.paint(distance, blood + 8 * scan.texture[box], box=box)
    for points, radius in (
        ([(22, 8, 180), (24, 6, 110)], 9.0),  # superior vena cava
        ([(-8, 24, 108), (-10, 14, 130), (-26, -2, 132)], 12.0),  # pulmonary trunk
        ([(-2, -24, 180), (-3, -20, 70), (-10, -8, 45)], 6.0),  # oesophagus
    ):
        box, distance = scan.tube(points, [radius] * len(points))
        scan.paint(distance, muscle if radius < 8 else blood, box=box)


def draw_gut(scan: Scan, rng: np.random.Generator, belly: np.ndarray, contrast: float) -> None:
    """Paint loops of small bowel, the colon with gas and contents, and the stomach with its air-fluid level."""
    for _ in range(110):
        centre = rng.uniform((-78, -12, -175), (78, 58, -50))
        box, distance = scan.blob(centre, rng.uniform(10, 22, 3), rotation(rng.uniform(0, 180, 3)))
        distance = np.maximum(distance, belly[box] + 2)
        scan.paint(distance, 45 + 45 * contrast, box=box)
        scan.paint(distance + 2.5, rng.uniform(5, 45), box=box)
    left, right = rng.normal(0, 5, 2)
    frame = [
        (84, -8, -190),
        (86, -5 + right, -110),
        (80, 15, -62),
        (40, 52, -75 + left),
        (-30, 54, -70 + right),
    ]
    frame += [(-76, 20, -40), (-92, -16, -70), (-90, -14 + left, -190)]
    bumps = 1.5 * np.sin(scan.x / 7) * np.cos(scan.z / 7)
    box, distance = scan.tube(frame, (23, 21, 18, 16, 16, 16, 14, 13))
    distance = np.maximum(distance + bumps[box], belly[box] + 2)
    scan.paint(distance, 50 + 25 * contrast, box=box)
    gas = scan.texture[box] + scan.y[box] / 40 > rng.uniform(0.3, 1.2)
    scan.paint(distance + 3, np.where(gas, -850, 15 + 45 * scan.texture[box]), box=box)

    centre = np.array([-48, 22, 2]) + rng.normal(0, 4, 3)
    radii = np.array([30, 31, 46]) * rng.uniform(0.8, 1.1)
    box, distance = scan.blob(centre, radii, rotation((15, -30, 0)))
    distance = np.maximum(distance, belly[box] + 4)
    scan.paint(distance, 45 + 40 * contrast, box=box)
    level = rng.uniform(8, 20)  # gas lies in front: the patient lies on the back
    scan.paint(distance + 4, np.where(scan.y[box] > centre[1] + level, -920, rng.uniform(5, 40)), box=box)


def draw_organs(scan: Scan, rng: np.random.Generator, belly: np.ndarray, contrast: float, blood: float) -> None:
    """Paint liver with vessels and gall bladder, pancreas, spleen and kidneys, of random position, size and pose."""

    def pose(*nominal: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        centre, radii, degrees = (np.asarray(n) for n in nominal)
        radii = radii * rng.normal(1, 0.05) * (1 + rng.normal(0, 0.04, 3))
        return centre + rng.normal(0, 3, 3), radii, rotation(degrees + rng.normal(0, 5, 3))

    liver_hu = 52 + 55 * contrast + rng.normal(0, 4)
    for position, size, degrees, slope in (
        ((56, -4, 0), (60, 74, 72), (0, 0, 0), 0.6),  # right lobe
        ((4, 36, 16), (64, 34, 32), (0, 12, -8), 0.3),  # left lobe
    ):
        box, distance = scan.blob(*pose(position, size, degrees))
        under = slope * (36 - scan.x[box]) - 0.8 * (scan.z[box] + 32)  # the lower surface rises to the middle
        distance = np.max([distance, belly[box] + 2, under], axis=0)
        scan.paint(distance, liver_hu + 3 * scan.texture[box], LABELS["liver"], box)
    vessels: list[tuple[list[npt.ArrayLike], Sequence[float]]] = [
        ([(10, -22, 44), (40, -4, 40), (80, 0, 26)], (5, 4, 2)),  # hepatic veins
        ([(10, -22, 44), (34, 24, 34), (52, 48, 16)], (5, 4, 2)),
        ([(10, -22, 44), (-6, 18, 34), (-24, 34, 26)], (4, 3, 2)),
        ([(12, 2, -34), (28, 4, -4), (56, -8, 4), (88, -20, -6)], (7, 6, 4, 2)),  # portal vein
        ([(28, 4, -4), (16, 30, 8), (-16, 42, 12)], (5, 4, 2)),
        ([(56, -8, 4), (68, 28, -8), (70, 40, -20)], (4, 3, 1.5)),
    ]
    for points, widths in vessels:
        box, distance = scan.tube(points, widths)
        scan.paint(np.maximum(distance, belly[box] + 3), liver_hu + 0.35 * (blood - 40), None, box)
    box, distance = scan.blob(*pose((44, 36, -34), (13, 24, 15), (25, 0, 0)))
    scan.paint(distance, 45 + 25 * contrast, box=box)
    scan.paint(distance + 2.5, 8, box=box)
    box, distance = scan.tube([(36, 6, -46), (16, 14, -38), (-20, 6, -26), (-62, -22, -14)], (13, 10, 9, 8))
    scan.paint(distance + 1.5 * scan.texture[box], 45 + 50 * contrast, box=box)

    box, distance = scan.blob(*pose((-78, -32, -8), (38, 53, 54), (20, 0, -15)))
    hollow = 34 - np.hypot(scan.x[box] + 42, scan.y[box] - 2)  # the stomach's side is concave
    distance = np.max([distance, hollow, belly[box] + 2], axis=0)
    spleen_hu = 50 + 70 * contrast + rng.normal(0, 4)
    scan.paint(distance, spleen_hu + 3 * scan.texture[box], LABELS["spleen"], box)

    for side, label, height in ((1, LABELS["right_kidney"], -62.0), (-1, LABELS["left_kidney"], -46.0)):
        centre, radii, turn = pose((side * 62.0, -36.0, height), (26.0, 23.5, 51.0), (8, side * 14, side * 20))
        box, distance = scan.blob(centre, radii + 7, turn)
        scan.paint(np.maximum(distance, belly[box] + 1), -100, box=box)
        box, distance = scan.blob(centre, radii, turn)
        _, sinus = scan.blob(centre + radii[0] * np.array([-0.75 * side, 0.35, 0]), (15, 10, 22), turn, box)
        distance = np.maximum(distance, -sinus)  # its fat makes the bean
        pyramids = (distance < -6) & (scan.texture[box] > -0.3)
        scan.paint(distance, 38 + 140 * contrast - 35 * contrast * pyramids, label, box)
        start = centre + radii[0] * np.array([-0.5 * side, 0.2, 0])
        box, distance = scan.tube([start, (side * 10, -12, centre[2] + 8)], (4, 4))
        scan.paint(distance, blood - 20, box=box)


def draw_spine_and_vessels(
    scan: Scan, rng: np.random.Generator, skin: np.ndarray, spine_y: np.ndarray, blood: float, muscle: float
) -> None:
    """Paint the spine with discs, canal, arches and processes, psoas muscles, vena cava and aorta."""
    box = scan.box((-60, -140, -200), (60, 40, 200))
    x, y, z, texture = (a[box] for a in (scan.x, scan.y - spine_y, scan.z, scan.texture))  # y from the bodies' middle
    side = np.abs(x)
    low = np.clip((20 - z) / 150, 0, 1.3)  # grows downwards from the lowest rib
    psoas = (np.hypot((side - 33 - 5 * low) / (17 * low + 1), (y - 1) / (19 * low + 1)) - 1) * 12
    scan.paint(np.maximum(psoas, 2 - 40 * low), muscle + 5 * texture, box=box)

    size = rng.normal(1, 0.05)
    spongy = rng.uniform(170, 240) + 25 * texture
    above = levels(z)[1]
    above += 0.08 * y  # the end plates tilt a little
    waist = 1 - 0.0006 * np.minimum(above**2, 150)
    column = (np.hypot(x / 22, y / 16.5) / (size * waist * (1 - 0.0007 * z)) - 1) * 17
    disc_half = 3.4 + 0.8 * low
    disc = 15 - 0.0175 * z - disc_half - np.abs(above)  # < 0 in a disc
    canal = (np.hypot(x / 11, (y + 24) / 8.5) - 1) * 9
    arch = np.max([np.abs(canal - 3) - 3.5, y + 16, np.abs(above + 5) - 10], axis=0)
    spinous = np.max([side - 3.6, y + 30, -58 - y, np.abs(above + 9 + 0.35 * (y + 36)) - 8.5], axis=0)
    spinous = np.maximum(spinous, skin[box] + 6)  # even in a thin back
    transverse = np.max([side - 38 + 4 * low, np.hypot(y + 21 + 0.18 * side, above - 1) - 5.5], axis=0)
    bone = np.minimum.reduce([column, arch, spinous, transverse])
    scan.paint(bone, np.where(bone > -2.2, 430, spongy), LABELS["spine"], box)
    plate = np.maximum(column, np.abs(disc) - 1.2)
    scan.paint(plate, 400, None, box)
    scan.paint(np.maximum(column, disc), 85, None, box)
    scan.paint(canal, 28, box=box)

    bow = rng.normal(0, 5)
    box = scan.box((-70, -120, -200), (70, 60, 200))
    x, y, z = (a[box] for a in (scan.x, scan.y - spine_y, scan.z))
    rise = np.clip((z - 20) / 90, 0, 1)
    cava = np.hypot(x - 20 - 3 * rise, (y - 26 - 16 * rise) * 1.25) - 11 * size
    scan.paint(np.maximum(cava, z - 58), 0.85 * blood, box=box)
    middle = -10 - 12 * rise + bow * np.sin(z / 45)
    radius = rng.uniform(9.5, 12.5) * (1 + 0.0012 * z)
    aorta = np.hypot(x - middle, y - 28 * size + 8 * rise) - radius
    scan.paint(aorta, blood + 15, LABELS["aorta"], box)
    box, distance = scan.tube([(4, 20, 98), (12, 22, 120), (14, 12, 190)], (13, 14.5, 14.5))  # ascending part
    scan.paint(distance, blood + 15, LABELS["aorta"], box)
