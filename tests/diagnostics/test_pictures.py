"""Pictures show the numbers, and the landscape's are those of the decomposition they stand for."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from adafisher_jax import diagnostics
from adafisher_jax.diagnostics import LayerReport, landscape, pictures
from adafisher_jax.diagnostics.pictures import training

DEGENERATE = {
    "1×1": np.full((1, 1), 2.0),
    "one 0": np.zeros((1, 1)),
    "zeros": np.zeros((3, 3)),
    "all alike": np.full((3, 3), 3.0),
    "negative": -np.eye(3),
    "identity": np.eye(3),
    "tiny": np.eye(3) * 1e-38,
    "huge": np.full((3, 3), 1e38),
    "no average": np.diag([1.0, 0.0, -1.0]),
    "integers": np.eye(3, dtype=int),
    "few bits": jnp.eye(3, dtype=jnp.bfloat16),
}


def walks(seed=0):
    """Two trajectories of a pytree, as the pytrees and as one array (points, parameters)."""
    rng = np.random.default_rng(seed)
    long, short = (np.cumsum(rng.normal(size=(count, 10)), 0) for count in (9, 5))

    def tree(row):
        return {"bias": jnp.asarray(row[:4]), "kernel": jnp.asarray(row[4:].reshape(2, 3))}

    return {"long": [*map(tree, long)], "short": [*map(tree, short)]}, np.concatenate([long, short])


def flat(tree):
    return np.concatenate([tree["bias"].reshape(-1, 4), tree["kernel"].reshape(-1, 6)], 1)


def test_the_plane_is_that_of_the_singular_vectors(x64):
    trajectories, points = walks()
    plane = landscape.principal_plane(trajectories)
    center = points.mean(0)
    _, singular, right = np.linalg.svd(points - center)
    signs = np.where(right[:2] @ (points[0] - center) > 0, -1, 1)
    np.testing.assert_allclose(flat(plane.center)[0], center, rtol=1e-12)
    np.testing.assert_allclose(flat(plane.axes), signs[:, None] * right[:2], atol=1e-12)
    np.testing.assert_allclose(plane.shares, singular[:2] ** 2 / np.sum(singular**2), rtol=1e-6)


def test_coordinates_are_the_closest_points_of_the_plane(x64):
    trajectories, points = walks()
    plane = landscape.principal_plane(trajectories)
    found = landscape.coordinates(plane, trajectories["short"])
    basis = flat(plane.axes).T
    expected, *_ = np.linalg.lstsq(basis, (points[9:] - flat(plane.center)).T)
    np.testing.assert_allclose(found, expected.T, atol=1e-12)
    assert (landscape.coordinates(plane, trajectories["long"])[0] <= 0).all()


def test_a_point_of_the_plane_has_its_own_loss(x64):
    trajectories, _ = walks()
    plane = landscape.principal_plane(trajectories)
    weights = jnp.arange(1.0, 11.0)

    def loss_fn(params, weights, power):
        return jnp.sum(
            weights * jnp.concatenate([params["bias"], params["kernel"].ravel()]) ** power
        )

    xs, ys = np.linspace(-2, 3, 5), np.linspace(0, 1, 3)
    found = landscape.evaluate(loss_fn, plane, xs, ys, weights, 2, at_once=4)
    again = landscape.evaluate(loss_fn, plane, xs, ys, weights, 2, at_once=100)
    np.testing.assert_allclose(again, found, rtol=1e-12)
    first, second = flat(plane.axes)
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            at = flat(plane.center)[0] + x * first + y * second
            np.testing.assert_allclose(found[i, j], np.sum(weights * at**2), rtol=1e-12)


def test_the_minimum_of_a_quadratic_is_where_descent_ends():
    minimum, curvature = np.array([1.0, -2.0, 0.0]), np.array([4.0, 1.0, 1.0])

    def loss_fn(params):
        return jnp.sum(curvature * (params - minimum) ** 2)

    steps = np.arange(60)[:, None]
    rates = {"gradient": 2 * 0.1 * curvature, "newton": 0.3}
    paths = {name: [*(minimum * (1 - (1 - rate) ** steps))] for name, rate in rates.items()}
    plane = landscape.principal_plane(paths)
    np.testing.assert_allclose(plane.shares.sum(), 1, rtol=1e-6)  # nothing moved in the third
    found = {name: landscape.coordinates(plane, points) for name, points in paths.items()}
    xs, ys = landscape.frame(found.values(), count=81)
    losses = landscape.evaluate(loss_fn, plane, xs, ys)
    row, column = np.unravel_index(np.argmin(losses), losses.shape)
    spacing = max(np.ptp(xs), np.ptp(ys)) / 80
    for path in found.values():
        np.testing.assert_allclose([xs[column], ys[row]], path[-1], atol=spacing)
        assert xs[0] < path[:, 0].min()
        assert path[:, 1].max() < ys[-1]


def test_parameters_of_few_bits_keep_their_type_and_get_finer_axes():
    points = [jnp.asarray(point, jnp.bfloat16) for point in np.eye(4)]
    plane = landscape.principal_plane({"sgd": points})
    assert (plane.center.dtype, plane.axes.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-6)
    types = []

    def loss_fn(params):
        types.append(params.dtype)
        return jnp.sum(params)

    landscape.evaluate(loss_fn, plane, [0.0], [0.0])
    assert set(types) == {jnp.dtype(jnp.bfloat16)}


def test_a_module_is_looked_at_by_its_parameters():
    module = nnx.Linear(2, 1, rngs=nnx.Rngs(1))
    graph, params = nnx.split(module, nnx.Param)
    trajectory = [
        jax.tree.map(lambda leaf, i=i: leaf + i + (i * leaf) ** 2, params) for i in range(4)
    ]
    plane = landscape.principal_plane({"sgd": trajectory})

    def loss_fn(params, x):
        return jnp.sum(nnx.merge(graph, params)(x) ** 2)

    (place,) = landscape.coordinates(plane, trajectory[:1])
    x = jnp.ones((1, 2))
    found = landscape.evaluate(loss_fn, plane, place[:1], place[1:], x)
    np.testing.assert_allclose(found, [[loss_fn(params, x)]], rtol=1e-5)


def test_points_that_span_no_plane_are_refused():
    line = [jnp.array([i, 2.0 * i, 0.0]) for i in range(5)]
    cases = {
        "got 2 points, wanted three": line[:2],
        "got 0 points": [],
        "on a line": line,
        r"trajectories\['sgd'\]\[5\]: 'w' has values that are not finite": [
            *({"w": point} for point in line),
            {"w": jnp.array([jnp.inf, 0, 0])},
        ],
        r"\['sgd'\]\[2\]: got arrays {'b': \(3,\)}, wanted those of the first, {'a': \(3,\)}": [
            {"a": line[0]},
            {"a": line[1]},
            {"b": line[2]},
        ],
    }
    for message, points in cases.items():
        with pytest.raises(ValueError, match=message):
            landscape.principal_plane({"sgd": points})
    with pytest.raises(ValueError, match="on a line"):
        landscape.principal_plane({"sgd": line[:1] * 3})


# Pictures.


@pytest.fixture
def axes():
    return Figure().add_subplot()


@pytest.fixture
def matrix():
    rows = np.random.default_rng(0).normal(size=(40, 12)) * np.geomspace(1, 1e-2, 12)
    return jnp.asarray(rows.T @ rows / 40, jnp.float32)


@pytest.fixture
def noisy(matrix):
    return diagnostics.add_noise(matrix, 0.05, jax.random.key(0))


def draw(axes):
    """Everything, so that warnings are seen."""
    axes.figure.draw_without_rendering()


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_heat_map_has_the_entries_relative_to_the_largest(axes, matrix):
    pictures.heat_map(axes, -5 * matrix)
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), -matrix / jnp.max(matrix), rtol=1e-6)
    assert axes.get_title(loc="right") == (
        f"{diagnostics.diagonal_energy(matrix):.0%} of squares on the diagonal"
    )
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "entry / largest"
    assert bar.get_ylim() == pytest.approx((-1, 1))
    draw(axes)


def test_a_small_entry_has_a_colour_of_its_own(axes):
    pictures.heat_map(axes, np.array([[1.0, 0.003], [-0.003, 1.0]]))
    (image,) = axes.images
    positive, zero, negative = image.to_rgba(np.array([0.003, 0.0, -0.003]))[:, :3]
    assert np.abs(positive - zero).max() > 0.1
    assert np.abs(negative - zero).max() > 0.1
    assert positive[0] > positive[2]  # red
    assert negative[0] < negative[2]  # blue


def test_discs_have_gershgorins_centres_and_radii(axes, matrix, noisy):
    pictures.discs(axes, matrix, noisy)
    lines = [line for line in axes.lines[1:] if len(line.get_xdata())]  # of the axis and legend
    for circles, line, one, colour in zip(
        axes.collections, lines, (matrix, noisy), pictures.COLOURS[:2], strict=True
    ):
        centers, radii = diagnostics.gershgorin(one)
        np.testing.assert_allclose(circles.get_offsets(), np.stack([centers, 0 * centers], 1))
        np.testing.assert_allclose(circles.get_widths(), 2 * radii, rtol=1e-6)
        np.testing.assert_allclose(circles.get_heights(), 2 * radii, rtol=1e-6)
        np.testing.assert_array_equal(line.get_xdata(), diagnostics.eigenvalues(one))
        np.testing.assert_array_equal(line.get_ydata(), 0)
        assert line.get_color() == to_hex(circles.get_edgecolor()[0]) == colour
    assert legend(axes) == ["eigenvalues", "with noise"]


def test_discs_with_noise_are_the_lower_halves(axes):
    alone = Figure().add_subplot()
    pictures.discs(alone, jnp.eye(2))
    assert alone.collections[0].get_clip_path() is None
    pictures.discs(axes, jnp.eye(2), jnp.array([[1.0, 0.5], [0.5, 1.0]]))
    axes.set_ylim(-0.1, 0.2)
    for circles, extent in zip(axes.collections, [(0, 0), (-1, 0)], strict=True):
        path, transform = circles.get_clip_path().get_transformed_path_and_affine()
        corners = axes.transData.inverted().transform(transform.transform(path.vertices))
        assert (corners[:, 1].min().round(6), corners[:, 1].max().round(6)) == extent
        np.testing.assert_array_equal(circles.get_clip_box().extents, axes.bbox.extents)


def test_a_disc_is_round_and_where_its_numbers_say(axes):
    pictures.discs(axes, np.array([[4.0, 3.0], [3.0, 9.0]]))
    draw(axes)
    assert axes.get_aspect() == 1
    (circles,) = axes.collections
    outline = circles.get_paths()[0].vertices @ circles.get_transforms()[0][:2, :2].T
    around = circles.get_transform().transform(outline) + axes.transData.transform([4.0, 0.0])
    around = axes.transData.inverted().transform(around)
    np.testing.assert_allclose([around.min(0), around.max(0)], [[1, -3], [7, 3]], atol=1e-6)
    low, high = axes.get_xlim()
    assert low <= 1 < 12 <= high


def test_eigenvalues_are_the_lines_and_the_kaiser_rule_their_labels(axes, matrix, noisy):
    pictures.eigenvalues(axes, matrix, noisy)
    *lines, average = axes.lines
    for line, one, name in zip(lines, (matrix, noisy), ("eigenvalues", "with noise"), strict=True):
        values = diagnostics.eigenvalues(one)
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 13))
        np.testing.assert_array_equal(line.get_ydata(), values)
        assert line.get_label() == f"{name}: {diagnostics.kaiser(values).sum()} of 12 above average"
    np.testing.assert_allclose(average.get_ydata(), jnp.trace(matrix) / 12, rtol=1e-5)
    assert axes.get_yscale() == "log"
    draw(axes)


def test_the_axis_of_eigenvalues_ends_at_round_off(axes):
    pictures.eigenvalues(axes, jnp.diag(jnp.array([1.0, 1e-3, 1e-9, 0.0])))
    assert 1e-4 < axes.get_ylim()[0] < 1e-3


def test_eigenvalues_about_zero_have_a_linear_axis(axes):
    pictures.eigenvalues(axes, jnp.diag(jnp.array([1.0, 0.0, -1.0])))
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "linear"
    assert low < -1 < 1 < high


def test_a_transform_is_in_decibels_on_its_frequencies(axes, matrix):
    pictures.fourier(axes, matrix)
    (image,) = axes.images
    magnitudes = np.abs(np.fft.fftshift(np.fft.fft2(matrix)))
    expected = np.maximum(20 * np.log10(magnitudes / magnitudes.max()), -60)
    np.testing.assert_allclose(image.get_array(), expected, atol=1e-3)
    assert image.origin == "lower"
    frequencies = np.fft.fftshift(np.fft.fftfreq(12))
    left, right, bottom, top = image.get_extent()
    np.testing.assert_allclose(
        [left, right], [frequencies[0] - 1 / 24, frequencies[-1] + 1 / 24], atol=1e-12
    )
    assert (bottom, top) == (left, right)
    assert axes.get_title(loc="right") == f"SNR {diagnostics.signal_to_noise(matrix):.1f} dB"
    draw(axes)


@pytest.mark.parametrize("matrix", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("name", ["heat_map", "discs", "eigenvalues", "fourier"])
def test_degenerate_matrices_are_drawn(name, matrix, axes):
    getattr(pictures, name)(axes, matrix)
    draw(axes)


@pytest.mark.parametrize("name", ["heat_map", "discs", "eigenvalues", "fourier"])
def test_what_is_no_matrix_is_refused(name, axes):
    draw_it = getattr(pictures, name)
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 3\), wanted a square one"):
        draw_it(axes, jnp.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="not finite"):
        draw_it(axes, jnp.array([[1.0, jnp.nan], [0.0, 1.0]]))


def layer_report(value, **fields):
    return LayerReport(*(jnp.float32(value) for _ in LayerReport._fields))._replace(**fields)


def test_lines_over_training_are_a_field_of_the_reports(axes):
    reports = [
        (step, {"low": layer_report(0.1 * step), "up": layer_report(step)}) for step in (1, 5, 9)
    ]
    pictures.over_training(axes, reports, "condition")
    for line, factor in zip(axes.lines, (0.1, 1), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [1, 5, 9])
        np.testing.assert_allclose(line.get_ydata(), factor * np.array([1, 5, 9]), rtol=1e-6)
    assert legend(axes) == ["up", "low"]  # in the order of their ends
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "condition of h ⊗ s")
    draw(axes)


def test_the_median_rate_has_its_band(axes):
    reports = [
        (step, {"up": layer_report(1, rate_low=jnp.float32(0.5), rate_high=jnp.float32(step))})
        for step in (2, 4)
    ]
    pictures.over_training(axes, reports, "rate_median")
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices}
    assert corners == {(2, 0.5), (4, 0.5), (2, 2), (4, 4)}
    draw(axes)


@pytest.mark.parametrize("field", LayerReport._fields)
@pytest.mark.parametrize("value", [0.0, np.inf])
def test_constant_reports_are_drawn_for_every_field(field, value, axes):
    pictures.over_training(axes, [(0, {"": layer_report(value)})], field)
    assert legend(axes)[0].startswith("(root)")
    draw(axes)


def test_what_was_not_reported_is_refused(axes):
    reports = [(0, {"up": layer_report(1, relative_step=None)})]
    for message, found, field in [
        ("not reported", reports, "relative_step"),
        ("got 'rate', wanted one of above_damping", reports, "rate"),
        ("got none", [], "age"),
    ]:
        with pytest.raises(ValueError, match=message):
            pictures.over_training(axes, found, field)


def test_every_field_has_a_name_and_every_layer_a_colour(axes):
    assert tuple(training.FIELDS) == LayerReport._fields
    reports = [(0, {f"layer {i}": layer_report(i + 1) for i in range(20)})]
    pictures.over_training(axes, reports, "condition")
    assert len({to_hex(line.get_color()) for line in axes.lines}) == 20


@pytest.fixture
def plane():
    return landscape.Plane(jnp.zeros(2), jnp.eye(2), jnp.array([0.7, 0.25]))


def test_paths_lie_on_contours_spaced_by_ratios(axes, plane):
    xs, ys = np.linspace(0, 3, 7), np.linspace(0, 2, 5)
    losses = 10 ** (xs + ys[:, None])
    paths = {"adafisher": np.array([[0, 0], [1, 1], [2, 1]]), "sgd": np.array([[0, 0], [3, 2]])}
    pictures.trajectories(axes, plane, losses, xs, ys, paths)
    shades, _ = axes.collections
    np.testing.assert_allclose(shades.levels, np.geomspace(1, 1e5, training.LEVELS))
    lines = {line.get_label(): line for line in axes.lines}
    for name, path in paths.items():
        np.testing.assert_array_equal(lines[name].get_xydata(), path)
    starts, ends = (
        [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == marker]
        for marker in "o*"
    )
    assert (starts, ends) == ([[[0, 0]], [[0, 0]], []], [[[2, 1]], [[3, 2]], []])
    assert legend(axes) == ["adafisher", "sgd", "start", "end"]
    assert axes.get_ylabel() == "PC 2 (25% of variance)"
    assert axes.get_aspect() == 1
    draw(axes)


@pytest.mark.parametrize("value", [0.0, -1.0, 5.0, np.nan, np.inf])
def test_a_flat_or_unknown_landscape_is_drawn_as_nothing(value, axes, plane):
    path = {"sgd": np.array([[0.0, 0.0]])}
    pictures.trajectories(axes, plane, np.full((3, 3), value), [0, 1, 2], [0, 1, 2], path)
    assert not axes.collections
    draw(axes)


def test_losses_of_any_sign_have_linear_contours(axes, plane):
    losses = np.arange(9.0).reshape(3, 3) - 4
    losses[2, 2] = np.nan
    pictures.trajectories(axes, plane, losses, [0, 1, 2], [0, 1, 2], {})
    np.testing.assert_allclose(axes.collections[0].levels, np.linspace(-4, 3, training.LEVELS))
    draw(axes)


def test_matplotlib_is_not_imported_unasked(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(pictures)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        pictures.heat_map(None, np.eye(2))
