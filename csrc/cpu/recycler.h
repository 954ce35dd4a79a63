// Memory of W_hat and dL/dW kept from one round to the next (CPU, eager).
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace srn {

// New tensors with the given sizes, strides and type. Large ones take the memory of an earlier
// tensor whose storage has died: each is a tensor of its own (own version counter, own storage), so
// copies, pickles and saved graphs see nothing unusual.
std::vector<at::Tensor> take_like(const std::vector<at::Tensor>& like, at::ScalarType type);
std::vector<at::Tensor> take_like(const std::vector<at::Tensor>& like);

// Frees all memory that is not lent; returns the bytes freed.
int64_t empty_recycler();

}  // namespace srn
