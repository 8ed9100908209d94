// The kernels of one instruction set, as a table.
//
// Where an instruction set brings new instructions for some kernels only, MIDSPAN_ISA_ELSEWHERE names the set from
// which the others are taken, and MIDSPAN_ISA_INTEGERS and MIDSPAN_ISA_BYTES those of the quantized linears.
#include <type_traits>

#include "../context.h"

#ifndef MIDSPAN_ISA_ELSEWHERE
#define MIDSPAN_ISA_ELSEWHERE MIDSPAN_ISA
#endif
#ifndef MIDSPAN_ISA_INTEGERS
#define MIDSPAN_ISA_INTEGERS MIDSPAN_ISA
#endif
#ifndef MIDSPAN_ISA_BYTES
#define MIDSPAN_ISA_BYTES MIDSPAN_ISA_INTEGERS
#endif
#define MIDSPAN_TEXT_OF(name) #name
#define MIDSPAN_TEXT(name) MIDSPAN_TEXT_OF(name)

namespace midspan {

template <auto Kernels::*member>
using Function = std::remove_pointer_t<std::remove_reference_t<decltype(Kernels{}.*member)>>;

namespace MIDSPAN_ISA {
#if defined(MIDSPAN_ISA_PAIRS)
Function<&Kernels::run_pair_linear> run_pair_linear;
#else
constexpr LinearKernel run_pair_linear = nullptr;
#endif
}  // namespace MIDSPAN_ISA

namespace MIDSPAN_ISA_INTEGERS {
Function<&Kernels::run_quantized_linear> run_quantized_linear;
}
namespace MIDSPAN_ISA_BYTES {
Function<&Kernels::run_byte_linear> run_byte_linear;
}

namespace MIDSPAN_ISA_ELSEWHERE {
Function<&Kernels::run_linear> run_linear;
Function<&Kernels::add_rms_norm> add_rms_norm;
Function<&Kernels::gated> gated;
Function<&Kernels::run_rotary> run_rotary;
Function<&Kernels::embedding> embedding;
Function<&Kernels::argmax> argmax;
Function<&Kernels::sample> sample;
Function<&Kernels::write_cache> write_cache;
Function<&Kernels::run_attention> run_attention;
Function<&Kernels::read_memory> read_memory;
Function<&Kernels::run_route> run_route;
Function<&Kernels::run_experts> run_experts;
Function<&Kernels::combine> combine;
}  // namespace MIDSPAN_ISA_ELSEWHERE

namespace MIDSPAN_ISA {

namespace others = MIDSPAN_ISA_ELSEWHERE;

const Kernels kernels = {
    MIDSPAN_TEXT(MIDSPAN_ISA),
    others::run_linear,
    run_pair_linear,
    MIDSPAN_ISA_INTEGERS::run_quantized_linear,
    MIDSPAN_ISA_BYTES::run_byte_linear,
    others::add_rms_norm,
    others::gated,
    others::run_rotary,
    others::embedding,
    others::argmax,
    others::sample,
    others::write_cache,
    others::run_attention,
    others::read_memory,
    others::run_route,
    others::run_experts,
    others::combine,
};

}  // namespace MIDSPAN_ISA

}  // namespace midspan
