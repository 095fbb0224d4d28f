// The kernel as an operator of torch's: operator.py registers it, and says what for.

#pragma once

#include <cstdint>
#include <deque>
#include <stdexcept>

#include "call.h"
#include "check.h"
#include "pools.h"

namespace {

// torch's stable C interface (aoti_torch/c/shim.h), of the libtorch that is loaded.
struct TorchApi {
    int (*data_ptr)(void* tensor, void** pointer);
    int (*size)(void* tensor, int64_t dimension, int64_t* size);
    int (*stride)(void* tensor, int64_t dimension, int64_t* stride);
    int (*dtype)(void* tensor, int32_t* type);
    int (*release)(void* tensor);
};

struct StepData {
    const int32_t* slots;
    int64_t n_slots, active, threads;
};

struct Layer {
    const PoolsData* pools;
    const StepData* step;
};

TorchApi torch_api;
std::deque<Layer> layers;  // only ever grows: graphs hold indices

struct Tensor {
    void* handle;  // owned
    void* data = nullptr;
    int64_t rows = 0, columns = 0, stride = 0, unit = 0;
    int32_t dtype = -1;
    bool good;

    explicit Tensor(uint64_t argument) : handle((void*)argument) {
        good = !torch_api.data_ptr(handle, &data) && !torch_api.size(handle, 0, &rows) &&
               !torch_api.size(handle, 1, &columns) && !torch_api.stride(handle, 0, &stride) &&
               !torch_api.stride(handle, 1, &unit) && !torch_api.dtype(handle, &dtype);
    }
    ~Tensor() { torch_api.release(handle); }

    bool fits(const PoolsData& pools, int64_t width) const {
        static const int32_t types[] = {6, 15, 5};  // c10::ScalarType: Float, BFloat16, Half
        return good && columns == width && (unit == 1 || width == 1) &&
               dtype == types[pools.element];
    }
};

}  // namespace

extern "C" {

void jd_bind_torch(const TorchApi* api) { torch_api = *api; }

int64_t jd_add_layer(const PoolsData* pools, const StepData* step) {
    layers.push_back({pools, step});
    return (int64_t)layers.size() - 1;
}

// (Tensor(a!) y, Tensor x, int layer) -> (): a boxed kernel of the stable interface.
void jd_torch_op(uint64_t* stack, uint64_t, uint64_t) {
    Tensor y(stack[0]), x(stack[1]);
    int64_t index = (int64_t)stack[2];
    if (index < 0 || index >= (int64_t)layers.size())
        throw std::out_of_range("vllm_jd: no such layer");
    const Layer& layer = layers[index];
    if (!layer.step->active) return;
    const PoolsData& pools = *layer.pools;
    const SliceData& last = pools.slices[pools.n_slices - 1];
    if (!x.fits(pools, pools.d_in) || !y.fits(pools, last.first_column + last.d_out) ||
        x.rows != y.rows || x.rows > layer.step->n_slots)
        throw std::invalid_argument("vllm_jd: the tensors of a call do not fit the layer's pools");
    if (jd_add_adapters(&pools, y.data, y.stride, x.data, x.stride, layer.step->slots, x.rows,
                        1, (int)layer.step->threads))
        throw std::out_of_range(error);
}
}
