// Memory of W_hat and dL/dW kept from one round to the next (CPU, eager).
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace srn {

// New tensors with the given sizes, strides and type. Large ones take the storage of an earlier
// tensor that nobody else refers to any more: each is a tensor of its own (own version counter, own
// storage), so copies, pickles and saved graphs see nothing unusual.
std::vector<at::Tensor> take_like(const std::vector<at::Tensor>& like, at::ScalarType type);
std::vector<at::Tensor> take_like(const std::vector<at::Tensor>& like);

// Frees every storage that is not in use; returns the bytes freed.
int64_t empty_recycler();

}  // namespace srn
