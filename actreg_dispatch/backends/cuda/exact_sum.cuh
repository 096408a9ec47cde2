// Sums without a rounding error: expansions in registers, superaccumulators in global memory.

// A superaccumulator (Kulisch): an integer of some 4,300 bits, with weights 6,400, in units of 2^UNIT.
// Word k weighs 2^(WORD_BITS k) units. It has 63 bits and a sign, so 2^37 amounts fit into it before
// anything is carried. Integers add up to the same in any order.

constexpr int INFINITIES = WORDS, NANS = WORDS + 1, CERTAIN = WORDS + 2, COUNTERS = WORDS + 3;

constexpr integer WORD_MASK = (1ULL << WORD_BITS) - 1;

// Add amount, or subtract it.
__device__ inline void accumulate(long long* word, integer amount, bool is_negative = false) {
    if (amount != 0) atomicAdd(reinterpret_cast<integer*>(word), is_negative ? -amount : amount);
}

// Add m * 2^shift units, m < 2^53. Moved by up to 25 bits, m has 78: PIECES words, of which this is
// one.
constexpr int PIECES = 3;

__device__ inline void accumulate_piece(
    int piece, integer m, int shift, long long* words, bool is_negative = false) {
    const int right = WORD_BITS * piece - shift % WORD_BITS;
    const integer amount = right > 0 ? m >> right : m << -right;
    accumulate(words + shift / WORD_BITS + piece, amount & WORD_MASK, is_negative);
}

__device__ inline void accumulate_piece(int piece, double x, long long* words) {
    const decoded d = decode(x);
    accumulate_piece(piece, d.m, d.shift - 1074 - UNIT, words, x < 0.0);
}

__device__ __noinline__ void accumulate_number(double x, long long* words) {
    for (int piece = 0; piece < PIECES; ++piece) accumulate_piece(piece, x, words);
}

// A product of two integers below 2^53 is high() * 2^53 + low(), both below 2^53, too.
struct product {
    integer upper, lower;  // words of 64 bits

    __device__ inline product(integer a, integer b) : upper(__umul64hi(a, b)), lower(a * b) {}
    __device__ inline integer high() const { return upper << 11 | lower >> 53; }
    __device__ inline integer low() const { return lower % (1ULL << 53); }
};
__device__ inline void accumulate_product(const product& p, int shift, long long* words) {
    for (int piece = 0; piece < PIECES; ++piece) {
        accumulate_piece(piece, p.low(), shift, words);
        accumulate_piece(piece, p.high(), shift + 53, words);
    }
}

// Add |x|^degree where x is infinite, NaN, or too large or small for what follows.
__device__ __noinline__ void accumulate_outlier(double x, int degree, long long* words) {
    if (!isfinite(x)) {
        accumulate(words + (isnan(x) ? NANS : INFINITIES), 1);
    } else if (degree == 1) {
        accumulate_number(fabs(x), words);
    } else {
        const decoded d = decode(x);
        accumulate_product(product(d.m, d.m), 2 * (d.shift - 1074) - UNIT, words);
    }
}

// A weight is finite and not negative, and one that is 0 is not added. Any other makes the sum NaN.
__device__ inline bool is_weight(double w) { return w > 0.0 && isfinite(w); }

// Add w |x|^degree where w is not a weight, or one of the two is as above.
__device__ __noinline__ void accumulate_outlier(double x, double w, int degree, long long* words) {
    if (!is_weight(w)) {
        accumulate(words + NANS, 1);
    } else if (!isfinite(x)) {
        accumulate_outlier(x, degree, words);
    } else {
        const decoded d = decode(x), v = decode(w);
        const int shift = degree * (d.shift - 1074) + (v.shift - 1074) - UNIT;
        if (degree == 1) {
            accumulate_product(product(d.m, v.m), shift, words);
        } else {
            const product square(d.m, d.m);
            accumulate_product(product(square.low(), v.m), shift, words);
            accumulate_product(product(square.high(), v.m), shift + 53, words);
        }
    }
}

// An expansion (Shewchuk): the value is the sum of the parts and of what went to the words. TwoSum
// (Knuth) leaves a rounded sum and its error, without an error of its own. The error goes to the
// next part, in general as far as the first or second, where it is 0. What the last part cannot
// hold goes to the words.
struct expansion {
    double part[PARTS] = {};

    __device__ inline void add(double x, long long* words) {
#pragma unroll
        for (int k = 0; k < PARTS; ++k) {
            const double s = part[k] + x;
            const double x_rounded = s - part[k];
            x = (part[k] - (s - x_rounded)) + (x - x_rounded);
            part[k] = s;
            if (x == 0.0) return;
        }
        accumulate_number(x, words);
    }

    // A float32 is far from the limits of binary64, and so is its square, which is exact.
    __device__ inline void add_absolute(float x, long long* words) {
        const double wide = widen(x);
        if (isfinite(wide)) {
            add(fabs(wide), words);
        } else {
            accumulate_outlier(wide, 1, words);
        }
    }
    __device__ inline void add_square(float x, long long* words) {
        const double wide = widen(x);
        if (isfinite(wide)) {
            add(wide * wide, words);
        } else {
            accumulate_outlier(wide, 2, words);
        }
    }

    // Add |x|. The limit leaves room for 2^63 terms.
    __device__ inline void add_absolute(double x, long long* words) {
        if (fabs(x) < 0x1p960) {
            add(fabs(x), words);
        } else {
            accumulate_outlier(x, 1, words);
        }
    }

    // Add x * x, whose rounding error is a number too between the limits.
    __device__ inline void add_square(double x, long long* words) {
        if (fabs(x) >= 0x1p-480 && fabs(x) < 0x1p480) {
            const double square = x * x;
            add(square, words);
            add(fma(x, x, -square), words);
        } else if (x != 0.0) {
            accumulate_outlier(x, 2, words);
        }
    }

    // The same with weights that are not 0. A product that is rounded leaves an error, which fma
    // tells, and which is a number too between the limits.

    // Of two float32 the product is exact.
    __device__ inline void add_absolute(float x, float w, long long* words) {
        const double wide = widen(x), weight = widen(w), product = fabs(wide) * weight;
        if (weight > 0.0 && isfinite(product)) {
            add(product, words);
        } else {
            accumulate_outlier(wide, weight, 1, words);
        }
    }
    // Of three it has 72 bits, and none below 2^-447.
    __device__ inline void add_square(float x, float w, long long* words) {
        const double wide = widen(x), weight = widen(w), square = wide * wide;
        const double product = square * weight;
        if (weight > 0.0 && isfinite(product)) {
            add(product, words);
            add(fma(square, weight, -product), words);
        } else {
            accumulate_outlier(wide, weight, 2, words);
        }
    }

    // Add w |x|. The last of its 106 bits is above 2^-1067.
    __device__ inline void add_absolute(double x, double w, long long* words) {
        const double product = fabs(x) * w;
        if (product >= 0x1p-960 && product < 0x1p960) {
            add(product, words);
            add(fma(fabs(x), w, -product), words);
        } else if (x != 0.0 || !is_weight(w)) {
            accumulate_outlier(x, w, 1, words);
        }
    }

    // Add w x * x, which is that of the rounded square, and that of its error. The last bits of
    // the error are above 2^-1067, of w times it above 2^-1060.
    __device__ inline void add_square(double x, double w, long long* words) {
        const double square = x * x, product = square * w;
        if (square >= 0x1p-960 && product >= 0x1p-900 && product < 0x1p960) {
            const double rest = fma(x, x, -square), product_of_rest = rest * w;
            add(product, words);
            add(fma(square, w, -product), words);
            add(product_of_rest, words);
            add(fma(rest, w, -product_of_rest), words);
        } else if (x != 0.0 || !is_weight(w)) {
            accumulate_outlier(x, w, 2, words);
        }
    }
};

// Add the expansions of all the threads of a block to the words.
__device__ inline void accumulate_block(expansion& mine, long long* words) {
    __shared__ double parts[PARTS][THREADS];
    const int t = threadIdx.x;
    __syncthreads();  // another sum may have been here before
#pragma unroll
    for (int k = 0; k < PARTS; ++k) parts[k][t] = mine.part[k];
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) {
#pragma unroll
            for (int k = 0; k < PARTS; ++k) mine.add(parts[k][t + half], words);
#pragma unroll
            for (int k = 0; k < PARTS; ++k) parts[k][t] = mine.part[k];
        }
    }
    __syncthreads();
    if (t < PARTS * PIECES) accumulate_piece(t % PIECES, parts[t / PIECES][0], words);
}

// From the first word to the last that is not 0; of several sums, in any of them.
struct nonzero_range { int low, high; };
__device__ inline nonzero_range range_of(long long word, ptrdiff_t counter) {
    const int k = int(counter % COUNTERS);
    return word != 0 && k < WORDS ? nonzero_range{k, k} : nonzero_range{WORDS, -1};
}
__device__ inline nonzero_range joined(const nonzero_range& a, const nonzero_range& b) {
    return {min(a.low, b.low), max(a.high, b.high)};
}

// RN64(S): the sum rounded to 53 bits, its exponent unbounded.
__device__ __noinline__ extended rounded_sum(const long long* words, const nonzero_range& range) {
    if (words[NANS] != 0) return extended(nan(""));
    if (words[INFINITIES] != 0) return extended(CUDART_INF);
    int canonical[WORDS], top = range.low;
    long long carry = 0;
    for (; top < WORDS && (top <= range.high || carry != 0); ++top) {
        carry += top <= range.high ? words[top] : 0;
        canonical[top] = int(carry & (long long)WORD_MASK);
        carry >>= WORD_BITS;
    }
    do --top; while (top >= range.low && canonical[top] == 0);
    if (top < range.low) return extended();
    // The first 64 bits are in four words; what follows only matters if it is not 0.
    integer window[4];
    for (int k = 0; k < 4; ++k) window[k] = top - k >= range.low ? canonical[top - k] : 0;
    const int empty = __clzll(window[0]) - (64 - WORD_BITS), cut = 40 - empty;
    const integer upper = window[0] << WORD_BITS | window[1];
    const integer lower = window[2] << WORD_BITS | window[3];
    bool below = lower % (1ULL << cut) != 0;
    for (int k = range.low; k <= top - 4; ++k) below = below || canonical[k] != 0;
    const long long e = WORD_BITS * (top - 1) - 12 - empty + UNIT;
    return rounded(false, upper << (12 + empty) | lower >> cut, e, below, false);
}
