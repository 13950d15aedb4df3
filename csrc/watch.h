// Whether somebody watches what tensors are asked to do.
#pragma once

namespace regfused {

// Whether a mode, a tracer or a functional transform is at work in this thread: a TorchDispatchMode (make_fx,
// FakeTensorMode), a TorchFunctionMode (but that of torch.set_default_device), torch.func, torch.jit.trace. What writes
// memory past the dispatcher is not seen there: such a step belongs to operators that it sees.
bool is_watched();

// Whether torch.jit.trace records what this thread does.
bool in_jit_trace();

// Whether a TorchFunctionMode (but that of torch.set_default_device) looks at what is called.
bool in_function_mode();

}  // namespace regfused
