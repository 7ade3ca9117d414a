// Lists of template instances of the kernels: combinations of weights, activations and tokens per block.
#pragma once

#include "stream.cuh"
#include "tiles.cuh"

namespace nybble {
namespace cuda {

template <class W_, class X_, int>
struct StreamOf {
  using W = W_;
  using X = X_;
  static constexpr int kRows = Stream<W>::kRows, kGroups = 1, kShared = Stream<W>::kShared, kBlockThreads = kThreads;
  static constexpr int kTokensOfBlock = kGroups * kTokens;
  static constexpr auto kernel = &stream_kernel<W, X>;
};

template <class W_, class X_, int MT>
struct TilesOf {
  using W = W_;
  using X = X_;
  static constexpr int kRows = Tiles<W, X, MT>::kRows, kGroups = MT, kShared = Tiles<W, X, MT>::kShared;
  static constexpr int kBlockThreads = Tiles<W, X, MT>::kBlockThreads, kTokensOfBlock = kGroups * kTokens;
  static constexpr auto kernel = &tiles_kernel<W, X, MT>;
};

template <class... T>
struct Each {};

template <class Of>
bool serves(const NybbleCudaProduct& product, const NybbleCudaLaunch& how) {
  using X = typename Of::X;
  const bool x_fits = X::kElementBytes == 1 || how.x_dtype == X::kDtype;
  return x_fits && how.token_groups == Of::kGroups && Of::W::serves(product);
}

// Compiled<Of, Weights, Activations, MT...>::Type lists Of<W, X, MT> for all combinations. Of is StreamOf or TilesOf,
// MT the number of groups of 8 tokens per block.
template <class... Lists>
struct Joined;
template <class... Of>
struct Joined<Each<Of...>> {
  using Type = Each<Of...>;
};
template <class... A, class... B, class... Rest>
struct Joined<Each<A...>, Each<B...>, Rest...> : Joined<Each<A..., B...>, Rest...> {};

template <template <class, class, int> class Of, class W, class Xs, int... MT>
struct OfWeight;
template <template <class, class, int> class Of, class W, class... X, int... MT>
struct OfWeight<Of, W, Each<X...>, MT...> {
  template <class One>
  using Tokens = Each<Of<W, One, MT>...>;
  using Type = typename Joined<Tokens<X>...>::Type;
};

template <template <class, class, int> class Of, class Ws, class Xs, int... MT>
struct Compiled;
template <template <class, class, int> class Of, class... W, class Xs, int... MT>
struct Compiled<Of, Each<W...>, Xs, MT...> {
  using Type = typename Joined<typename OfWeight<Of, W, Xs, MT...>::Type...>::Type;
};

using Floats = Each<Bf16, F16>;
// With all zero points 8, and with others; with groups of at least a step along K, and smaller ones.
using Frag4Forms = Each<Frag4<true, 1>, Frag4<true, 2>, Frag4<false, 1>, Frag4<false, 2>>;
using Frag4FormsS8 = Each<Frag4<true, 1, 2>, Frag4<true, 4, 2>, Frag4<false, 1, 2>, Frag4<false, 4, 2>>;
using Quads4Forms = Each<Quads4<1>, Quads4<2>>;

}  // namespace cuda
}  // namespace nybble
