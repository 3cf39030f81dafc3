"""Tests the pictures by what is in their axes, and that every text can be read."""

import itertools
import pickle
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad
from jaxgrad import plot_descent, plot_gradient_flow, plot_tangent

matplotlib = pytest.importorskip("matplotlib")
from matplotlib import pyplot  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.contour import QuadContourSet  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.quiver import Quiver  # noqa: E402
from matplotlib.text import Text  # noqa: E402


@pytest.fixture(autouse=True)
def settings_are_left():
    settings, wide = matplotlib.rcParams.copy(), jax.config.jax_enable_x64
    yield
    assert matplotlib.rcParams.copy() == settings
    assert jax.config.jax_enable_x64 is wide
    assert pyplot.get_fignums() == []


def rosenbrock(p):
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def slope(line):
    x, y = line.get_data()
    return (y[-1] - y[0]) / (x[-1] - x[0])


def arrows(axes):
    """Where each arrow starts, and its length along both axes."""
    (quiver,) = axes.findobj(Quiver)
    return quiver.get_offsets(), np.column_stack([quiver.U, quiver.V])


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def names(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def marks(axes):
    """Of each row's name: where its marker is, or the word that it stands for."""
    found = {}
    for line in axes.lines:
        word = line.get_label()
        for x, y in np.column_stack(line.get_data()):
            found[names(axes)[int(y)]] = float(x) if word.startswith("_") else word
    return found


def descend(loss, params, *args, learning_rate, steps):
    path = [params]
    for _ in range(steps):
        gradient = jaxgrad.grad(loss)(path[-1], *args)
        path.append(
            jax.tree.map(lambda p, g: p - learning_rate * g, path[-1], gradient)
        )
    return path


def test_the_lessons_limit():
    figure = plot_tangent(lambda w: w**2, 3.0)
    (axes,) = figure.axes
    assert isinstance(figure, Figure)
    assert tuple(figure.get_size_inches()) == (6, 4)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("w", "loss L(w)")
    assert axes.get_title() == "Tangent and secants at w = 3"
    slopes = {"h = 2": 8, "h = 1": 7, "h = 0.5": 6.5, "h = 0.1": 6.1, "tangent": 6}
    labels = [f"{name}: slope {value}" for name, value in slopes.items()]
    assert legend(axes) == ["loss", *labels]
    for label, value in zip(labels, slopes.values(), strict=True):
        line = lines(axes)[label]
        np.testing.assert_allclose(slope(line), value, rtol=1e-4)
        np.testing.assert_allclose(np.interp(3, *line.get_data()), 9, rtol=1e-6)
    x, y = lines(axes)["loss"].get_data()
    np.testing.assert_allclose(y, x**2, rtol=1e-6)
    assert x.min() < 3 < 5 < x.max()
    looks = [(line.get_color(), line.get_linestyle()) for line in lines(axes).values()]
    assert len(set(looks)) == len(looks)


def test_a_tangent_with_arguments_aux_and_negative_steps():
    def loss(w, scale):
        return scale * jnp.sin(w), scale

    (axes,) = plot_tangent(
        loss, np.float64(1.0), jnp.array(2.0), steps=[-1.0], has_aux=True
    ).axes
    _, secant, *_, tangent, _ = axes.lines
    np.testing.assert_allclose(slope(secant), 2 * np.sin(1), rtol=1e-5)
    np.testing.assert_allclose(slope(tangent), 2 * np.cos(1), rtol=1e-5)
    (axes,) = plot_tangent(lambda w: w**2, 3.0, steps=()).axes
    assert legend(axes) == ["loss", "tangent: slope 6"]


def test_what_is_not_finite_is_a_gap():
    (axes,) = plot_tangent(jnp.log, 1.0, steps=(1.0, -1.5)).axes
    x, y = lines(axes)["loss"].get_data()
    np.testing.assert_array_equal(np.isnan(y), x <= 0)
    assert "h = -1.5: slope nan" in legend(axes)
    (axes,) = plot_tangent(lambda w: jnp.where(w > 2, jnp.inf, w), 1.0).axes
    x, y = lines(axes)["loss"].get_data()
    np.testing.assert_array_equal(np.isnan(y), x > 2)
    assert "h = 2: slope nan" in legend(axes)
    (axes,) = plot_tangent(jnp.sqrt, 0.0).axes
    assert legend(axes)[-1] == "tangent: slope inf"
    # From 0.25 a step of 0.25 leads to 0, where the square root has no finite slope.
    axes, _ = plot_descent(
        lambda p: jnp.sqrt(p[0]) + p[1], jnp.array([0.25, 1.0]), learning_rate=0.25
    ).axes
    note = "Gradient descent, 1 point\nloss or gradient not finite at point 1"
    assert axes.get_title() == note
    np.testing.assert_array_equal(lines(axes)["path"].get_xydata(), [[0.25, 1]])


@pytest.mark.parametrize("learning_rate", [0.01, 0.05])
def test_one_parameter(neuron, learning_rate):
    params, *data = neuron
    (axes,) = plot_descent(
        jaxgrad.linear_loss,
        params,
        *data,
        entries="weight[0][2]",
        learning_rate=learning_rate,
        steps=6,
    ).axes
    path = descend(
        jaxgrad.linear_loss, params, *data, learning_rate=learning_rate, steps=6
    )
    both = [jaxgrad.value_and_grad(jaxgrad.linear_loss)(p, *data) for p in path]
    points = [(p.weight[0, 2], value) for p, (value, _) in zip(path, both, strict=True)]
    slopes = np.array([gradient.weight[0, 2] for _, gradient in both])
    np.testing.assert_allclose(lines(axes)["path"].get_xydata(), points, atol=1e-6)
    at, along = arrows(axes)
    np.testing.assert_allclose(at, points, atol=1e-6)
    assert (along[:, 1] <= 0).all()  # downhill, on the tangent, by one factor
    np.testing.assert_allclose(along[:, 1], slopes * along[:, 0], atol=1e-5)
    np.testing.assert_allclose(
        along[:, 0], slopes * along[0, 0] / slopes[0], atol=1e-5 * abs(along[0, 0])
    )
    # The curve is a slice through the last point, which it therefore meets.
    curve = lines(axes)["loss"]
    x = curve.get_xdata()
    rest = (path[-1].weight[0, :2] * data[0][0, :2]).sum() + path[-1].bias[0]
    np.testing.assert_allclose(
        curve.get_ydata(), (rest + 3 * x - 5) ** 2, rtol=1e-3, atol=1e-5
    )
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("weight[0][2]", "loss")
    assert "7 points\nother parameters held at the last point" in axes.get_title()


def test_two_parameters(neuron):
    params, *data = neuron
    loss, how = jaxgrad.linear_loss, {"learning_rate": 0.01, "steps": 5}
    entries = ["bias[0]", "weight[0][2]"]
    axes, _ = plot_descent(loss, params, *data, entries=entries, **how).axes
    path = descend(loss, params, *data, **how)
    points = [(p.bias[0], p.weight[0, 2]) for p in path]
    np.testing.assert_allclose(lines(axes)["path"].get_xydata(), points, rtol=1e-5)
    np.testing.assert_allclose(lines(axes)["start"].get_xydata(), points[:1])
    at, along = arrows(axes)
    np.testing.assert_allclose(at, points, rtol=1e-5)
    np.testing.assert_allclose(along[:, 1], 3 * along[:, 0], rtol=1e-4)
    assert (along > 0).all()
    assert (axes.get_xlabel(), axes.get_ylabel()) == tuple(entries)
    # The arrows are inside.
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    tips = at + along
    assert (tips > (left, low)).all()
    assert (tips < (right, high)).all()


def test_the_path_that_training_took(neuron):
    params, *data = neuron
    path = [params]
    for seed in range(4):  # any path, not only that of gradient descent
        noise = 0.1 * jax.random.normal(jax.random.key(seed), (1, 3))
        path.append(path[-1]._replace(weight=path[-1].weight + noise))
    figure = plot_descent(jaxgrad.linear_loss, params, *data, entries=BOTH, path=path)
    axes, _ = figure.axes  # the second is the colours' bar
    assert axes.get_title().startswith("Training, 5 points")
    _, marked = lines(axes)["path"].get_data()
    np.testing.assert_allclose(marked, [p.weight[0, 2] for p in path])


def test_contours_are_those_of_the_loss():
    def loss(p):
        return p[0] ** 2 + 4 * p[1] ** 2 + p[0] * p[1]

    axes, bar = plot_descent(loss, np.array([-1.2, 1.0]), learning_rate=0.05).axes
    assert axes.get_title() == "Gradient descent, 21 points"  # with nothing held
    assert bar.get_ylabel() == "loss"
    (filled,) = axes.findobj(QuadContourSet)
    assert filled.cmap.name == "cividis"
    sides = (np.linspace(*ends, 81) for ends in (axes.get_xlim(), axes.get_ylim()))
    grid = loss(np.meshgrid(*sides))
    shares = [np.mean(grid < level) for level in filled.levels]
    np.testing.assert_allclose(shares, np.linspace(0, 1, 13), atol=0.01)
    for low, high, path in zip(
        filled.levels[:-1], filled.levels[1:], filled.get_paths(), strict=True
    ):
        values = loss(path.vertices.T)
        assert low - 0.02 < values.min() < values.max() < high + 0.02


def test_a_run_that_diverges_ends_where_it_must():
    (axes,) = plot_descent(lambda w: w**2, 3.0, learning_rate=1e5, steps=99).axes
    x, y = lines(axes)["path"].get_data()
    assert axes.get_title() == (
        f"Gradient descent, {len(x)} points\n"
        f"loss or gradient not finite at point {len(x)}"
    )
    assert 2 < len(x) < 10
    assert np.isfinite(y).all()


def test_other_leaves_are_left_alone():
    def loss(params, flag, key):
        assert flag is True
        assert params["name"] == "ridge"
        noise = jax.random.normal(key, (2,))
        return jnp.sum(params["w"][1:] ** 2) + 0 * noise[0], noise

    params = {"w": jnp.arange(3.0), "name": "ridge", "key": jax.random.key(0)}
    (axes,) = plot_descent(
        loss,
        params,
        True,
        jax.random.key(1),
        entries=["w[2]"],
        learning_rate=lambda step: 0.5 / (1 + step),
        steps=1,
        has_aux=True,
    ).axes
    np.testing.assert_array_equal(lines(axes)["path"].get_xydata(), [[2, 5], [0, 0]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_dtype_and_a_constant(dtype):
    with jax.enable_x64(dtype == "float64"):
        w = jnp.asarray(3.0, dtype)
        (axes,) = plot_descent(lambda w: w**2, w, learning_rate=0.1).axes
        np.testing.assert_allclose(lines(axes)["path"].get_ydata()[0], 9)
        plot_tangent(lambda w: w**2, w)
        plot_gradient_flow(w)
        axes, _ = plot_descent(
            lambda p: 3 + 0 * p.sum(), jnp.ones(2, dtype), learning_rate=0.1
        ).axes
        assert not arrows(axes)[1].any()


def mlp_gradient(depth):
    model = eqx.nn.MLP(3, 1, 8, depth, key=jax.random.key(0))
    return jaxgrad.grad(lambda model: jnp.sum(model(jnp.ones(3)) ** 2))(model)


def test_flow_of_each_leaf():
    gradient = mlp_gradient(2)
    (axes,) = plot_gradient_flow(gradient).axes
    assert axes.get_xscale() == "log"
    expected = {
        f"layers[{k}].{part}": np.linalg.norm(getattr(layer, part))
        for k, layer in enumerate(gradient.layers)
        for part in ("weight", "bias")
    }
    assert names(axes) == list(expected)
    assert axes.get_legend() is None
    np.testing.assert_allclose(
        list(marks(axes).values()), list(expected.values()), rtol=1e-6
    )


def test_flow_of_many_leaves():
    deep = plot_gradient_flow(mlp_gradient(12))  # all named, in a higher picture
    assert len(names(deep.axes[0])) == 26
    assert 4 < deep.get_figheight() < 12
    deeper = plot_gradient_flow(mlp_gradient(60))
    (axes,) = deeper.axes
    assert deeper.get_figheight() == 12
    assert names(axes)[:2] == ["layers[0].weight", "layers[1].bias"]
    assert sum(len(line.get_xdata()) for line in axes.lines) == 122


BAD = {
    "first": {"weight": jnp.array([3.0, 4.0]), "bias": jnp.zeros(2)},
    "second": {"weight": jnp.array([1e-3, jnp.nan]), "bias": jnp.array([-jnp.inf])},
    "third": {"weight": jnp.full(3, 1e30), "rate": None, "bias": jnp.zeros(0)},
}


def test_flow_marks_what_a_logarithm_lacks():
    (axes,) = plot_gradient_flow(BAD).axes
    assert legend(axes) == ["zero", "NaN", "inf"]
    assert marks(axes) == {
        "first.bias": "zero",
        "first.weight": 5,
        "second.bias": "inf",
        "second.weight": "NaN",
        "third.bias": "zero",
        "third.weight": pytest.approx(3**0.5 * 1e30),
    }
    left, right = axes.get_xlim()
    assert 0 < left < 5 < 2e30 < right
    (axes,) = plot_gradient_flow(jnp.zeros(2)).axes
    assert legend(axes) == ["zero"]


def test_long_names_stay_different():
    def shown(names_of):
        gradient = {names_of(k): jnp.ones(1) for k in range(2)}
        return names(plot_gradient_flow(gradient).axes[0])

    assert shown(lambda k: f"{'a' * 40}_{k}") == [
        f"{'a' * 17}…{'a' * 16}_{k}" for k in range(2)
    ]
    middle = shown(lambda k: f"{'a' * 40}_{k}_{'b' * 40}")
    assert middle == [f"{k}: {'a' * 17}…{'b' * 18}" for k in range(2)]


def test_flow_of_an_object_that_has_a_gradient():
    class Trace:
        def __init__(self):
            self.gradient = {"w": jnp.ones(1)}

    class Layer(eqx.Module):
        gradient: jax.Array
        bias: jax.Array

    assert names(plot_gradient_flow(Trace()).axes[0]) == ["w"]
    layer = Layer(jnp.ones(1), jnp.ones(1))  # a tree of its own
    assert names(plot_gradient_flow(layer).axes[0]) == ["gradient", "bias"]


DEEP = "blocks[0].self_attention.query_projection.kernel"
TREE = {"blocks": [{"self_attention": {"query_projection": {"kernel": jnp.ones(3)}}}]}
LONG = {
    f"a_very_long_$name$_of_module_{k}": {"projection" * 4: jnp.ones(1)} for k in "ab"
}
NEURON = (
    jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3])),
    jnp.array([[1.0, 2.0, 3.0]]),
    jnp.array([[5.0]]),
)
BOTH = ["weight[0][0]", "weight[0][2]"]


def neuron_picture(entries, learning_rate):
    return plot_descent(
        jaxgrad.linear_loss, *NEURON, entries=entries, learning_rate=learning_rate
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_tangent(lambda w: w**2, 3.0),
        lambda: plot_tangent(lambda w: w**2, 12345.678, steps=(1e4, -1e3)),
        lambda: neuron_picture("weight[0][2]", 0.01),
        lambda: neuron_picture(BOTH, 0.05),
        lambda: neuron_picture(BOTH, 0.1),
        lambda: plot_descent(lambda w: w**2, 3.0, learning_rate=10.0, steps=90),
        lambda: plot_descent(rosenbrock, jnp.array([-1.2, 1]), learning_rate=1e-3),
        lambda: plot_descent(
            lambda p: jnp.sum(
                p["blocks"][0]["self_attention"]["query_projection"]["kernel"]
            ),
            TREE,
            entries=[f"{DEEP}[0]", f"{DEEP}[2]"],
            learning_rate=1.0,
        ),
        lambda: plot_gradient_flow(mlp_gradient(2)),
        lambda: plot_gradient_flow(mlp_gradient(12)),
        lambda: plot_gradient_flow(mlp_gradient(60)),
        lambda: plot_gradient_flow(BAD),
        lambda: plot_gradient_flow([BAD] * 20),
        lambda: plot_gradient_flow(LONG),
        lambda: plot_gradient_flow([LONG] * 7),
    ],
)
def test_every_text_can_be_read(draw, monkeypatch):
    drawn = {}
    original = Text.draw

    def remember(text, renderer):
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent(renderer)
        original(text, renderer)

    figure = draw()
    monkeypatch.setattr(Text, "draw", remember)
    figure.set_dpi(100)
    FigureCanvasAgg(figure).draw()
    assert len(drawn) >= 5
    for text, box in drawn.items():
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
    for (one, box), (other, another) in itertools.combinations(drawn.items(), 2):
        overlap = np.minimum(box.max, another.max) - np.maximum(box.min, another.min)
        assert overlap.min() < 1, (one, other)
    for axes in figure.axes:
        labels = [label for label in names(axes) if label]
        assert len(set(labels)) == len(labels)


def test_a_notebook_shows_it_and_a_file_keeps_it(tmp_path):
    figure = plot_tangent(lambda w: w**2, 3.0)
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "tangent.pdf")
    again = pickle.loads(pickle.dumps(figure))
    assert again._repr_png_().startswith(b"\x89PNG")


def test_draws_into_given_axes(neuron):
    params, *data = neuron
    figure = Figure(figsize=(12, 4), layout="constrained")
    one, two, three = figure.subfigures(1, 2)[1].subplots(1, 3)
    assert plot_tangent(lambda w: w**2, 3.0, axes=one) is figure
    picture = plot_descent(
        jaxgrad.linear_loss, params, *data, entries=BOTH, learning_rate=0.1, axes=two
    )
    assert picture is figure
    assert plot_gradient_flow(params, axes=three) is figure
    assert len(figure.axes) == 4  # with the colour bar
    FigureCanvasAgg(figure).draw()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "draw",
    [
        lambda axes: plot_tangent(lambda w: w**2, 3.0, axes=axes),
        lambda axes: plot_descent(lambda w: w**2, 3.0, learning_rate=0.1, axes=axes),
        lambda axes: plot_gradient_flow(jnp.ones(1), axes=axes),
    ],
    ids=["tangent", "descent", "flow"],
)
def test_no_matplotlib_or_no_axes(draw, monkeypatch):
    for wrong in (Figure(), Figure().subplots(1, 2), 1):
        with pytest.raises(TypeError, match="axes"):
            draw(wrong)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxgrad\[plot\]'"):
        draw(None)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("w", "options", "words"),
    [
        (jnp.ones((1, 2)), {}, "a single number.*plot_descent"),
        ({"a": jnp.ones(()), "b": jnp.ones(())}, {}, "a single number"),
        (3.0, {"steps": [1.0, 0.0]}, "h = 0.0, which gives no second point"),
        (3.0, {"steps": [np.inf]}, "h = inf"),
        (3.0, {"steps": [np.nan]}, "h = nan"),
        (3.0, {"steps": [1e300]}, r"h = 1e\+300"),
    ],
)
def test_a_tangent_needs_one_number_and_real_steps(w, options, words):
    with pytest.raises(ValueError, match=words):
        plot_tangent(lambda w: w**2, w, **options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"entries": "weight[0][3]"},
            ValueError,
            r"no entry `weight\[0\]\[3\]`.*`weight` of shape \(1, 3\), `bias` of",
        ),
        ({"entries": "weights[0][0]"}, ValueError, "no entry"),
        ({"entries": "weight[0]"}, ValueError, r"no entry `weight\[0\]`"),
        ({"entries": "weight[0, 0]"}, ValueError, "no entry"),
        ({"entries": "bias[-1]"}, ValueError, "no entry"),
        ({"entries": "bias[0]x"}, ValueError, "no entry"),
        ({"entries": []}, ValueError, "over one or two parameters"),
        ({}, ValueError, "over one or two parameters: name them, such as e"),
        ({"entries": [*BOTH, "bias[0]"]}, ValueError, "over one or two parameters"),
        (
            {"learning_rate": None, "entries": BOTH},
            ValueError,
            "either the path or a learning_rate",
        ),
        (
            {"path": [1.0], "entries": BOTH},
            ValueError,
            "either the path or a learning_rate",
        ),
        (
            {"path": [1.0], "learning_rate": None, "entries": BOTH},
            ValueError,
            "Point 0 of the path has the structure",
        ),
        (
            {"path": [], "learning_rate": None, "entries": BOTH},
            ValueError,
            "No path to draw",
        ),
        ({"entries": BOTH, "learning_rate": -1.0}, ValueError, "learning_rate"),
    ],
)
def test_a_descent_needs_entries_and_a_step(neuron, options, error, words):
    params, *data = neuron
    with pytest.raises(error, match=words):
        plot_descent(
            jaxgrad.linear_loss, params, *data, **{"learning_rate": 0.1} | options
        )


@pytest.mark.bad_input
def test_a_descent_starts_where_the_loss_is_finite():
    with pytest.raises(ValueError, match="not finite at point 0"):
        plot_descent(jnp.log, -1.0, learning_rate=0.1)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("gradient", "error", "words"),
    [
        ({}, ValueError, "no leaves"),
        (None, ValueError, "no leaves"),
        ({"w": jnp.arange(2)}, TypeError, "Leaf `w` is a .*jaxgrad.grad"),
        (jnp.sum, TypeError, "Leaf `params` is a"),
    ],
)
def test_a_flow_needs_gradients(gradient, error, words):
    with pytest.raises(error, match=words):
        plot_gradient_flow(gradient)
