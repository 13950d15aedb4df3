"""What torch asks of its own optimizers: state, checkpoints, hooks, names, copies, groups."""

import copy
import io
import pickle

import pytest
import torch
from optimizer_infos import FLAGS, TestCase, assert_same, each_case, each_optimizer, instantiate
from step_cases import DEVICE, assert_params_equal, copy_params, give_grads, make_params, share_grads
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

SIZES = (1, 3, 17, 33, 65)
NAMES = [f"layer{i}.weight" for i in range(len(SIZES))]


def train(params, *optimizers_and_twins, steps=2) -> None:
    """The same gradients for all."""
    for _ in range(steps):
        give_grads(params)
        for optimizer, twins in optimizers_and_twins:
            share_grads(params, twins)
            optimizer.step()


def trained(info, kwargs, params=None, named=False):
    """Parameters, and their optimizer after two steps."""
    params = make_params(SIZES) if params is None else params
    optimizer = info.optim_cls(list(zip(NAMES, params, strict=True)) if named else params, **copy.deepcopy(kwargs))
    train(params, (optimizer, params))
    return params, optimizer


def assert_alike(params, optimizer, twins, twin) -> None:
    """The same bits for some steps more, and the same state then."""
    assert_params_equal(params, twins)
    train(params, (optimizer, params), (twin, twins))
    assert_params_equal(params, twins)
    assert_same(twin.state_dict()["state"], optimizer.state_dict()["state"])


def theirs_of(info, params, kwargs):
    """torch's own optimizer with those of the options that it has."""
    known = info.theirs(make_params([1])).defaults
    return info.theirs(params, **{k: v for k, v in copy.deepcopy(kwargs).items() if k in known})


def copy_of(given):
    """Optimizers write into the groups that they are given."""
    if isinstance(given, dict):
        return dict(given)
    return [copy_of(item) for item in given] if isinstance(given, list) else given


def public(thing) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


class TestState(TestCase):
    @each_case()
    def test_state_dict_is_deterministic(self, info, kwargs):
        params, optimizer = trained(info, kwargs)
        first, second = optimizer.state_dict(), optimizer.state_dict()
        assert_same(second, first)
        assert first is not second and first["param_groups"][0] is not optimizer.param_groups[0]
        for i, p in enumerate(params):
            for name, value in optimizer.state.get(p, {}).items():
                assert first["state"][i][name] is value
        torch.manual_seed(0)
        _, again = trained(info, kwargs)
        assert_same(again.state_dict(), first)
        theirs = theirs_of(info, make_params(SIZES), kwargs).state_dict()["param_groups"][0]
        assert set(theirs) <= set(first["param_groups"][0]), "what torch expects in a checkpoint"

    @each_case()
    def test_loading_gives_the_same_optimizer(self, info, kwargs):
        params, optimizer = trained(info, kwargs)
        saved = copy.deepcopy(optimizer.state_dict())
        kept = copy.deepcopy(saved)
        twins = copy_params(params)
        twin = info.optim_cls(twins, lr=0.7)
        twin.load_state_dict(saved)
        assert_same(saved, kept)
        assert_same(twin.state_dict(), kept)
        assert_alike(params, optimizer, twins, twin)

    @each_case()
    def test_saving_to_a_file(self, info, kwargs):
        params, optimizer = trained(info, kwargs)
        for weights_only in (True, False):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            loaded = torch.load(file, weights_only=weights_only)
            assert_same(loaded, optimizer.state_dict())
            twins = copy_params(params)
            twin = info.optim_cls(twins)
            twin.load_state_dict(loaded)
            assert_alike(params, optimizer, twins, twin)

    @each_case({}, {"foreach": True})
    def test_older_checkpoints(self, info, kwargs):
        """What a group lacks keeps the value that the constructor gave it."""
        params, optimizer = trained(info, kwargs)
        options = [name for name in optimizer.defaults if name not in ("lr", "momentum")]
        gone = [{name} for name in options] + [set(info.not_og_supported_flags), set(options)]
        for names in gone:
            saved = copy.deepcopy(optimizer.state_dict())
            for name in names & set(saved["param_groups"][0]):
                del saved["param_groups"][0][name]
            twins = copy_params(params)
            twin = info.optim_cls(twins, **copy.deepcopy(kwargs))
            twin.load_state_dict(saved)
            assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
            assert_same(twin.state_dict()["state"], optimizer.state_dict()["state"])
        assert_alike(params, optimizer, twins, twin)

    @each_case()
    def test_momentum_buffers_that_are_none(self, info, kwargs):
        """As older versions of torch wrote them: the next gradient is a first one."""
        params = make_params(SIZES)
        twins = copy_params(params)
        twin = info.optim_cls(twins, **copy.deepcopy(kwargs))
        saved = twin.state_dict()
        saved["state"] = {i: {"momentum_buffer": None} for i in range(len(SIZES))}
        twin.load_state_dict(saved)
        assert all(twin.state[q] == {"momentum_buffer": None} for q in twins)
        optimizer = info.optim_cls(params, **kwargs)
        train(params, (optimizer, params), (twin, twins))
        assert_params_equal(params, twins)
        if kwargs.get("momentum"):
            assert_same(twin.state_dict()["state"], optimizer.state_dict()["state"])

    @each_case()
    def test_checkpoints_of_another_dtype(self, info, kwargs):
        _, optimizer = trained(info, kwargs, make_params(SIZES, torch.float64))
        saved = copy.deepcopy(optimizer.state_dict())
        for entry in saved["state"].values():
            entry.update({name: value.cpu() for name, value in entry.items()})
        for dtype in (torch.float32, torch.bfloat16):
            params, twins = (make_params(SIZES, dtype) for _ in range(2))
            ours, theirs = info.optim_cls(params), info.theirs(twins)
            for o in (ours, theirs):
                o.load_state_dict(saved)
            assert_same(ours.state_dict()["state"], theirs.state_dict()["state"])
            for p in params:
                for name, value in ours.state.get(p, {}).items():
                    assert name == "step" or (value.dtype == dtype and value.device == p.device)
            before = copy_params(params)
            ours.param_groups[0]["lr"] = 0.5  # not lost in the rounding of bfloat16
            train(params, (ours, params))
            assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))

    @each_optimizer
    def test_checkpoints_that_do_not_fit(self, info):
        params = make_params([3, 17])
        optimizer = info.optim_cls(params, lr=0.1)
        for groups, message in (
            ([{"params": [params[0]]}, {"params": [params[1]]}], "different number of parameter groups"),
            ([{"params": [params[0]]}], "doesn't match the size of optimizer's group"),
        ):
            before = copy.deepcopy(optimizer.state_dict())
            with pytest.raises(ValueError, match=message):
                optimizer.load_state_dict(info.theirs(groups, lr=0.3).state_dict())
            assert_same(optimizer.state_dict(), before)

    @each_optimizer
    def test_hooks_of_state_dict(self, info):
        _, optimizer = trained(info, {"lr": 0.1, **({} if info.counts_steps else {"momentum": 0.9})})
        calls = []

        def replace(o, state_dict):
            calls.append("post")
            assert o is optimizer
            return {**state_dict, "note": 1}

        def amend(o, state_dict):
            calls.append("second post")
            assert state_dict.pop("note") == 1
            state_dict["kept"] = 2

        handles = [
            optimizer.register_state_dict_pre_hook(lambda o: calls.append(("pre", o is optimizer))),
            optimizer.register_state_dict_pre_hook(lambda o: calls.append("before it"), prepend=True),
            optimizer.register_state_dict_post_hook(amend),
            optimizer.register_state_dict_post_hook(replace, prepend=True),
        ]
        saved = optimizer.state_dict()
        assert calls == ["before it", ("pre", True), "post", "second post"]
        assert saved["kept"] == 2 and "note" not in saved
        for handle in handles:
            handle.remove()
        assert set(optimizer.state_dict()) == {"state", "param_groups"} and len(calls) == 4

    @each_optimizer
    def test_hooks_of_load_state_dict(self, info):
        params, optimizer = trained(info, {"lr": 0.1, **({} if info.counts_steps else {"momentum": 0.9})})
        saved = copy.deepcopy(optimizer.state_dict())
        kept = copy.deepcopy(saved)
        twins = copy_params(params)
        twin = info.optim_cls(twins)
        calls = []

        def replace(o, state_dict):
            calls.append("pre")
            assert o is twin and state_dict["note"] == 1
            return {**state_dict, "param_groups": [{**g, "lr": 0.25} for g in state_dict["param_groups"]]}

        def amend(o, state_dict):
            calls.append("before it")
            state_dict["note"] = 1  # in a copy

        def post(o):
            calls.append("post")
            assert o is twin and o.param_groups[0]["lr"] == 0.25

        def before_post(o):
            calls.append("before post")

        handles = [
            twin.register_load_state_dict_pre_hook(replace),
            twin.register_load_state_dict_pre_hook(amend, prepend=True),
            twin.register_load_state_dict_post_hook(post),
            twin.register_load_state_dict_post_hook(before_post, prepend=True),
        ]
        twin.load_state_dict(saved)
        assert calls == ["before it", "pre", "before post", "post"]
        assert_same(saved, kept)
        assert_same(twin.state_dict()["state"], kept["state"])
        for handle in handles:
            handle.remove()
        twin.load_state_dict(saved)
        assert len(calls) == 4 and twin.param_groups[0]["lr"] == 0.1
        assert_alike(params, optimizer, twins, twin)

    @each_case()
    def test_names(self, info, kwargs):
        params, optimizer = trained(info, kwargs, named=True)
        assert optimizer.param_groups[0]["param_names"] == NAMES
        assert optimizer.param_groups[0]["params"] == params
        saved = optimizer.state_dict()
        assert saved["param_groups"][0]["param_names"] == NAMES
        torch.manual_seed(0)
        _, unnamed = trained(info, kwargs)
        plain = unnamed.state_dict()
        assert_same(plain["state"], saved["state"])
        assert "param_names" not in plain["param_groups"][0]
        # A checkpoint's names win, and none of it leaves what is there.
        for source, named, want in (
            (saved, True, NAMES),
            (saved, False, NAMES),
            (plain, True, "own"),
            (plain, False, None),
        ):
            twins = copy_params(params)
            twin = info.optim_cls([("own", q) for q in twins] if named else twins)
            twin.load_state_dict(copy.deepcopy(source))
            assert twin.param_groups[0].get("param_names") == (["own"] * len(SIZES) if want == "own" else want)
            assert_same(twin.state_dict()["state"], saved["state"])

    @each_optimizer
    def test_names_in_groups(self, info):
        params = make_params(SIZES)
        named = list(zip(NAMES, params, strict=True))
        optimizer = info.optim_cls([{"params": named[:2]}, {"params": iter(named[2:4]), "lr": 0.5}], lr=0.1)
        optimizer.add_param_group({"params": named[4:]})
        assert [group["param_names"] for group in optimizer.param_groups] == [NAMES[:2], NAMES[2:4], NAMES[4:]]
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.1]
        extra = make_params([3, 4])
        for other, group, message in (
            (optimizer, {"params": extra}, "cannot add param group without names to the optimizer"),
            (info.optim_cls(params), {"params": [("a", extra[0])]}, "cannot add param group with names"),
            (optimizer, {"params": [("a", extra[0]), extra[1]]}, "Some param names are missing"),
        ):
            before = copy.copy(other.param_groups)
            with pytest.raises(ValueError, match=message):
                other.add_param_group(group)
            assert other.param_groups == before
        with pytest.warns(UserWarning, match="duplicate parameters"):
            info.optim_cls([("a", params[0]), ("b", params[0])])

    @each_case()
    def test_hooks_of_step(self, info, kwargs):
        params = make_params(SIZES)
        optimizer = info.optim_cls(params, **kwargs)
        give_grads(params)
        calls, before = [], copy_params(params)

        def note(name, moved):
            def hook(o, args, kwargs):
                assert o is optimizer and args[0] is optimizer
                assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)) is not moved
                calls.append(name)

            return hook

        def closure():
            calls.append("closure")
            return torch.tensor(5.0)

        handles = [
            optimizer.register_step_post_hook(note("post", True)),
            optimizer.register_step_pre_hook(note("pre", False)),
            register_optimizer_step_post_hook(note("global post", True)),
            register_optimizer_step_pre_hook(note("global pre", False)),
        ]
        try:
            assert optimizer.step() is None
        finally:
            for handle in handles:
                handle.remove()
        assert calls == ["global pre", "pre", "post", "global post"]
        assert optimizer.step() is None and len(calls) == 4
        # A hook that hands a closure to the step, by place and by name.
        for changed in (((optimizer, closure), {}), ((optimizer,), {"closure": closure})):
            with optimizer.register_step_pre_hook(lambda *_, changed=changed: changed):
                assert optimizer.step().item() == 5.0
        assert calls[4:] == ["closure", "closure"]
        with (
            optimizer.register_step_pre_hook(lambda *_: "nonsense"),
            pytest.raises(RuntimeError, match="must return None or a tuple"),
        ):
            optimizer.step()

    @each_case()
    def test_deepcopy_and_pickle(self, info, kwargs):
        params, optimizer = trained(info, kwargs)
        optimizer.param_groups[0]["lr"] = 0.0625
        for duplicate in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
            twin = duplicate(optimizer)
            assert type(twin) is type(optimizer) and public(twin) == public(optimizer)
            assert_same(twin.defaults, optimizer.defaults)
            assert_same(twin.state_dict(), optimizer.state_dict())
            assert repr(twin) == repr(optimizer)
            twins = twin.param_groups[0]["params"]
            assert not any(p is q for p, q in zip(params, twins, strict=True))
            assert_alike(params, optimizer, twins, twin)

    @each_case()
    def test_no_public_attributes_of_our_own(self, info, kwargs):
        _, optimizer = trained(info, kwargs)
        twins = make_params(SIZES)
        theirs = theirs_of(info, twins, kwargs)
        train(twins, (theirs, twins))
        assert public(optimizer) == public(theirs)
        assert isinstance(optimizer, info.theirs)
        assert optimizer.step.__self__ is optimizer

    @each_case()
    def test_repr(self, info, kwargs):
        first, second = make_params([3]), make_params([4])
        optimizer = info.optim_cls([{"params": first}, {"params": second, "lr": 0.0625}], **kwargs)
        options = {**optimizer.defaults, **kwargs}
        lines = repr(optimizer).splitlines()
        assert lines[0] == f"{info.optim_cls.__name__} (" and lines[-1] == ")"
        for g, lr in enumerate((options["lr"], 0.0625)):
            want = [f"    {name}: {value}" for name, value in sorted({**options, "lr": lr}.items())]
            start = lines.index(f"Parameter Group {g}") + 1
            assert lines[start : start + len(want)] == want

    @each_case()
    def test_groups(self, info, kwargs):
        params = make_params(SIZES)
        optimizer = info.optim_cls(iter(params[:2]), **kwargs)
        optimizer.add_param_group({"params": params[2], "lr": 0.5})
        group = {"params": iter(params[3:])}
        optimizer.add_param_group(group)
        assert [g["params"] for g in optimizer.param_groups] == [params[:2], [params[2]], params[3:]]
        assert [set(g) for g in optimizer.param_groups] == [{"params", *optimizer.defaults}] * 3
        assert optimizer.param_groups[1]["lr"] == 0.5
        assert all(g[k] is v for g in optimizer.param_groups[::2] for k, v in optimizer.defaults.items())
        # A list of groups that somebody else made is as good.
        twins = copy_params(params)
        twin = info.optim_cls(twins[:1])
        twin.param_groups = [
            {**g, "params": qs}
            for g, qs in zip(optimizer.param_groups, (twins[:2], twins[2:3], twins[3:]), strict=True)
        ]
        assert_alike(params, optimizer, twins, twin)

    @each_optimizer
    def test_groups_as_torch_refuses_them(self, info):
        params = make_params([3, 4])
        for bad in (
            [],
            params[0],
            ["weight"],
            [{"params": set(params)}],
            [{"params": ["weight"]}],
            [params[0] * 2],
            [{"params": params}, {"params": params}],
            3,
            [{"lr": 0.1}],
        ):
            with pytest.raises(Exception) as theirs:
                info.theirs(copy_of(bad), lr=0.1)
            with pytest.raises(type(theirs.value)) as ours:
                info.optim_cls(bad, lr=0.1)
            assert type(ours.value) is type(theirs.value) and str(ours.value) == str(theirs.value)
        optimizer, loop = info.optim_cls(params[:1], lr=0.1), info.theirs(params[:1], lr=0.1)
        for bad in ([params[1]], {"params": set(params)}, {"params": params[0]}, {"params": [params[1] * 2]}, {}):
            with pytest.raises(Exception) as theirs:
                loop.add_param_group(copy_of(bad))
            with pytest.raises(type(theirs.value)) as ours:
                optimizer.add_param_group(bad)
            assert str(ours.value) == str(theirs.value) and len(optimizer.param_groups) == 1
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer.add_param_group({"params": [params[1], params[1]]})

    @each_case()
    def test_zero_grad(self, info, kwargs):
        params = make_params(SIZES)
        optimizer = info.optim_cls(params, **kwargs)
        give_grads(params)
        params[0].grad = None
        grads = [p.grad for p in params]
        optimizer.zero_grad(set_to_none=False)
        for p, grad in zip(params, grads, strict=True):
            assert p.grad is grad and (grad is None or not grad.any())
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)

    @each_case()
    def test_state_of_torch_and_back(self, info, kwargs):
        """A checkpoint of torch's optimizer, and ours for it, where both have the options."""
        if not info.is_torchs({k: v for k, v in kwargs.items() if k not in FLAGS}):
            return
        kwargs = {"lr": 0.1, **kwargs}
        params, optimizer = trained(info, kwargs)
        twins = copy_params(params)
        loop = theirs_of(info, twins, {**kwargs, "foreach": False, "fused": False})
        loop.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(params, (optimizer, params), (loop, twins))
        # Values of a size of 4 in float32, in four steps.
        assert_params_equal(params, twins, atol=4e-6)
        back = info.optim_cls(params, **kwargs)
        back.load_state_dict(copy.deepcopy(loop.state_dict()))
        assert all(t.device.type == DEVICE for s in back.state.values() for t in s.values())
        train(params, (back, params), (loop, twins))
        assert_params_equal(params, twins, atol=8e-6)


instantiate(TestState, globals())
