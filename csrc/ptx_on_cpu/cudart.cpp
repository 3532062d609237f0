// What a program asks of the CUDA runtime, answered by the device of device.h: a program linked with this in place of
// libcudart runs unchanged. Everything happens at once, in the order of the calls, so streams are nothing but names.
//
// nvcc's host code registers a "fat binary" with each file's PTX in it and, by the address of a function of the host,
// each kernel; kernels are launched by that address.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "device.h"

using ptx_on_cpu::Device;
using ptx_on_cpu::Dim;
using ptx_on_cpu::Entry;
using ptx_on_cpu::Module;

namespace {

// As GPUs of compute capability 8.6 have them, but few multiprocessors: then few blocks occupy the device, and small
// inputs take more than one pass of the largest grid. Devices differ in these alone.
constexpr int kMultiprocessors[] = {4, 1, 2, 7};
constexpr int kDevices = int(std::size(kMultiprocessors));
constexpr size_t kSharedOptIn = 99 << 10, kSharedPlain = 48 << 10;

struct Kernel {
  Entry* entry = nullptr;
  size_t asked_for = 0;  // of dynamic shared memory; until then there is what 48 KiB leave
};
struct Pushed {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}
std::vector<Pushed> pushed;
int current = 0;
cudaError_t last = cudaSuccess, broken = cudaSuccess;  // broken: a kernel failed, and the device is of no use any more

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

// The text of a fat binary's PTX: it ends with a zero. Binaries are made with --no-compress.
std::string text_in(const char* data) {
  uint16_t header;
  uint64_t bytes;
  memcpy(&header, data + 6, 2);
  memcpy(&bytes, data + 8, 8);
  const std::string_view all(data, header + bytes);
  const auto start = all.find(".version ");
  if (start == all.npos) return "there is no PTX in this file: it was built without, or with compression";
  return std::string(all.substr(start, all.find('\0', start) - start));
}

cudaError_t checked(const Kernel& k, dim3 grid, dim3 block, size_t shared) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!k.entry) return cudaErrorInvalidDeviceFunction;
  if (!grid.x || !grid.y || !grid.z || !threads) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (threads > k.entry->most_threads || block.z > 64) return cudaErrorInvalidConfiguration;
  const size_t all = k.entry->static_shared + shared;
  if ((all > kSharedPlain && shared > k.asked_for) || all > kSharedOptIn) return cudaErrorInvalidValue;
  return broken;
}

cudaError_t launch(const void* host, dim3 grid, dim3 block, void** args, size_t shared) {
  const Kernel& k = kernels()[host];
  const cudaError_t error = checked(k, grid, block, shared);
  if (error != cudaSuccess) return noted(error);
  try {
    Device::get().launch(*k.entry, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, uint32_t(shared), args);
  } catch (const ptx_on_cpu::Fault& f) {
    fprintf(stderr, "ptx_on_cpu: %s\n", f.what());
    broken = cudaErrorLaunchFailure;
  }
  return cudaSuccess;  // what a kernel does is known later, as on a GPU
}

}  // namespace

extern "C" {

// ---- what nvcc's host code calls --------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void* wrapper) {
  struct {
    int magic, version;
    const char* data;
  } fat;
  memcpy(&fat, wrapper, sizeof fat);
  Module* module = Device::get().load(text_in(fat.data));
  if (!module) {
    fprintf(stderr, "ptx_on_cpu: %s\n", Device::get().error.c_str());
    exit(3);
  }
  return reinterpret_cast<void**>(module);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  auto& entries = reinterpret_cast<Module*>(handle)->entries;
  const auto found = entries.find(name);
  kernels()[host].entry = found == entries.end() ? nullptr : &found->second;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Pushed p = pushed.back();
  pushed.pop_back();
  *grid = p.grid;
  *block = p.block;
  *shared = p.shared;
  memcpy(stream, &p.stream, sizeof p.stream);
  return cudaSuccess;
}
// Newer compilers' host code asks for a handle first: here it is the address itself.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  memcpy(kernel, &host, sizeof host);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, args, shared);
}

// ---- the runtime ------------------------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch(host, grid, block, args, shared);
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return noted(cudaErrorNotSupported);
  Kernel& k = kernels()[host];
  if (!k.entry || value < 0 || size_t(value) + k.entry->static_shared > kSharedOptIn)
    return noted(cudaErrorInvalidValue);
  k.asked_for = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = nullptr;
  if (!bytes) return cudaSuccess;
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!*pointer) return noted(cudaErrorMemoryAllocation);
  memset(*pointer, 0xcd, bytes);
  Device::get().memory.add(*pointer, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  if (pointer && !Device::get().memory.remove(pointer)) return noted(cudaErrorInvalidValue);
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  size_t hint = 0;
  const Device& d = Device::get();
  if (bytes && kind != cudaMemcpyDeviceToHost && !d.memory.holds(uint64_t(to), bytes, &hint))
    return noted(cudaErrorInvalidValue);
  if (bytes && kind != cudaMemcpyHostToDevice && !d.memory.holds(uint64_t(from), bytes, &hint))
    return noted(cudaErrorInvalidValue);
  if (broken == cudaSuccess && bytes) memcpy(to, from, bytes);
  return noted(broken);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  size_t hint = 0;
  if (bytes && !Device::get().memory.holds(uint64_t(to), bytes, &hint)) return noted(cudaErrorInvalidValue);
  if (bytes) memset(to, value, bytes);
  return noted(broken);
}
// Little enough that nobody tries what needs gigabytes.
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = size_t(1) << 30;
  *free = *total - std::min(*total, Device::get().memory.total());
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static uintptr_t streams = 0x100;
  *stream = reinterpret_cast<cudaStream_t>(++streams);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return noted(broken); }
cudaError_t cudaDeviceSynchronize() { return noted(broken); }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return Device::get().error.c_str();
  return error == cudaSuccess                     ? "no error"
         : error == cudaErrorInvalidValue         ? "invalid argument"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration"
                                                  : "another CUDA error";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return noted(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return noted(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors[device]; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(kSharedOptIn); return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(kSharedPlain); return cudaSuccess;
    default: return noted(cudaErrorNotSupported);
  }
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= kDevices) return noted(cudaErrorInvalidDevice);
  *p = {};
  snprintf(p->name, sizeof p->name, "PTX on the CPU, %d multiprocessors", kMultiprocessors[device]);
  p->major = 8;
  p->minor = 6;
  p->multiProcessorCount = kMultiprocessors[device];
  p->sharedMemPerBlock = kSharedPlain;
  p->sharedMemPerBlockOptin = kSharedOptIn;
  p->warpSize = ptx_on_cpu::kLanes;
  return cudaSuccess;
}

}  // extern "C"
