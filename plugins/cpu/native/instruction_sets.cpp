// Which kernels the processor runs: what it says of itself, what the system allows, and, for tiles, a proof.
//
// Compiled for the oldest supported processor.
#include "instruction_sets.h"

#include <cstdlib>
#include <cstring>

#if defined(MIDSPAN_CPU_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace midspan {

namespace {

#if defined(MIDSPAN_CPU_X86)

struct Features {
  bool avx2, avx512, avx512vnni, avx512bf16, tiles;
};

Features read_features() {
  Features found{};
  __builtin_cpu_init();
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  found.avx512 = found.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  found.avx512vnni = found.avx512 && __builtin_cpu_supports("avx512vnni");
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) found.avx512bf16 = found.avx512vnni && (eax >> 5 & 1) != 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // products of bfloat16, tiles, products of bytes
    found.tiles = found.avx512bf16 && (edx & wanted) == wanted;
  }
  return found;
}

/// Tiles are a state that the system must save; it wants to be asked once for each process.
bool tiles_are_allowed() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

/// One linear layer by two instruction sets; whether the results differ by rounding at most.
bool agree(const Kernels& kernels, const Kernels& other, int32_t format) {
  constexpr int64_t rows = 35, n = 40, k = 150;
  uint16_t x[rows * k], weight[n * k];
  uint32_t state = 12345;
  const auto next = [&state] { return (state = state * 1664525u + 1013904223u) >> 16; };
  for (uint16_t& item : x) item = static_cast<uint16_t>(0x3f00u + (next() & 0x80ffu));
  for (uint16_t& item : weight) item = static_cast<uint16_t>(0x3f00u + (next() & 0x80ffu));
  float scales[n];
  for (float& scale : scales) scale = 0.5f;
  const midspan_cpu_weight source = {weight, 2 * k, scales, nullptr, n, k, format, 0};
  Context context{};
  context.threads = 1;
  const size_t bytes = static_cast<size_t>(packed_linear_bytes(source));
  void* packed = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (packed == nullptr) return false;
  pack_linear(context, source, packed);
  const midspan_cpu_linear linear = {packed,
                                     nullptr,
                                     n,
                                     k,
                                     format,
                                     MIDSPAN_CPU_BFLOAT16,
                                     MIDSPAN_CPU_FLOAT32,
                                     1.0f,
                                     0.0f,
                                     0,
                                     nullptr};
  float results[2][rows * n];
  const Kernels* both[] = {&kernels, &other};
  bool done = true;
  for (int index = 0; index < 2; ++index) {
    const LinearKernel run = linear_kernel(*both[index], format);
    done = done && run(context, linear, x, k, rows, results[index], n) == MIDSPAN_CPU_OK;
  }
  std::free(packed);
  for (void* memory : context.scratch) std::free(memory);
  for (int64_t index = 0; done && index < rows * n; ++index) {
    const float difference = results[0][index] - results[1][index];
    done = difference < 1e-3f && difference > -1e-3f;  // sums of 150 products below 1
  }
  return done;
}

/// Tiles are used where their products are those that they are documented to be.
bool tiles_are_proven() {
  static const bool proven = tiles_are_allowed() && agree(amx::kernels, amx_emulated::kernels, MIDSPAN_CPU_DENSE_PAIRS) &&
                             agree(amx::kernels, amx_emulated::kernels, MIDSPAN_CPU_INT8_DYNAMIC);
  return proven;
}

#endif

bool runnable(const Kernels& kernels) {
#if defined(MIDSPAN_CPU_X86)
  static const Features features = read_features();
  if (&kernels == &amx::kernels) return features.tiles && tiles_are_proven();
  if (&kernels == &avx512bf16::kernels) return features.avx512bf16;
  if (&kernels == &avx512vnni::kernels) return features.avx512vnni;
  if (&kernels == &avx512::kernels) return features.avx512;
  if (&kernels == &avx2::kernels) return features.avx2;
#endif
  return &kernels == &portable::kernels || &kernels == &amx_emulated::kernels;
}

const Kernels* const kBestFirst[] = {
#if defined(MIDSPAN_CPU_X86)
    &amx::kernels,    &avx512bf16::kernels, &avx512vnni::kernels, &avx512::kernels, &avx2::kernels,
#endif
    &portable::kernels, &amx_emulated::kernels};

struct ListOfNames {
  char text[96] = "";
  ListOfNames() {
    for (const Kernels* kernels : kBestFirst) {
      if (!runnable(*kernels)) continue;
      if (text[0] != '\0') std::strcat(text, " ");
      std::strcat(text, kernels->name);
    }
  }
};

}  // namespace

const Kernels* choose_kernels(const char* name) {
  for (const Kernels* kernels : kBestFirst) {
    if ((name == nullptr || std::strcmp(name, kernels->name) == 0) && runnable(*kernels)) return kernels;
  }
  return nullptr;
}

const char* runnable_sets() {
  static const ListOfNames names;
  return names.text;
}

}  // namespace midspan
