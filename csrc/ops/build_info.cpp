// What this library was built from, for `ensadv-fast info`, which reads it through ctypes and so without torch.
#define ENSADV_STRING_(x) #x
#define ENSADV_STRING(x) ENSADV_STRING_(x)

#if defined(__clang__)
#define ENSADV_COMPILER "clang++ " __clang_version__
#else
#define ENSADV_COMPILER "g++ " __VERSION__
#endif

extern "C" __attribute__((visibility("default"))) const char* ensadv_build_info() {
  return "compiler=" ENSADV_COMPILER
         ";cxx_standard=" ENSADV_STRING(__cplusplus) ";abi_target=" ENSADV_STRING(TORCH_TARGET_VERSION)
         ";commit=" ENSADV_COMMIT ";cuda=" ENSADV_CUDA_VERSION ";cuda_archs=" ENSADV_CUDA_ARCHS;
}
