// Sums that are off by no more than a known part of themselves, at the speed of memory.
//
// What a norm makes of its sums depends on their roundings to 53 bits alone. Mostly a sum that is
// nearly right tells them, so passes add up by TwoSum, and the certificate asks whether the results
// are the same at both ends of what the true sum may be (Ziv's test; see sums/certified.py, whose
// words are used here). Only if they are not are the kernels of exact_sum.cuh needed.
//
// TwoSum(a, b) is s = RN(a + b) and its error, exactly (Knuth). A lane, what one thread adds up,
// keeps the running sum of its terms and adds up the errors; only that rounds. All terms are >= 0.
//
// float32, with u = 2^-24. A group is what a thread adds up at once: n <= 16 elements of float32,
// n <= 32 of 16 bits. The sum of a group is S. Each error is at most u S, and so is the sum of what
// all squares lose to their own rounding, which fma tells: n u S in all at most, in fewer than 2 n
// additions for float32, n for 16 bits, whose squares have at most 22 bits. Each of these additions
// is off by at most u of what has been added: together by less than 31 * 16 u^2 S < 2^-39 S, or
// 31 * 31 u^2 S < 2^-38.09 S. Both numbers of the group are then added up, and that is added to a
// sum in binary64. A thread has at most count / 2^19 + 33 groups (LOADS may be 2), and its sum goes
// through fewer than 32 additions of threads, warps and blocks: (count / 2^19 + 66) 2^-53 S. All
// that together is below
//
//     bound = 2^-38 + 2^-70 count.
//
// A square loses at most 2^-150 more where it or its error is subnormal, which is nothing next to
// that (2^-44) if the sum is at least 2^-106 count; a smaller one is not certified.
//
// float64, with u = 2^-53. A lane runs through all of a thread's elements, n <= count / 2^18 + 66,
// and joins fewer than 32 others. So fewer than 2 n + 64 numbers are added to the errors, which sum
// up to less than (n + 33) u S, and each addition is off by u of that:
//
//     bound = 2^-104 (count / 2^18 + 128)^2 > 2 (n + 32) (n + 33) u^2.
//
// A square loses at most 2^-1074 more, which is nothing (2^-114) if the sum is at least
// 2^-960 count. A smaller sum of |x| is not certified either: so both ends are normal numbers.
//
// What overflows leaves an infinity or NaN in the sum, and so do an infinity and NaN themselves.
//
// Weights. A term is the rounded product of w and |x|, or of w and the rounded square. fma tells the
// product's error, and w times the square's error is added by another fma; neither is more than u
// of the term, up to what is below u^2 of it. So there are n more numbers, and u S more of them.
//
// float32: at most (n + 1) u S in fewer than 3 n additions. A group is n <= LOADS = 4 elements,
// since weights are not loaded by vectors: 11 * 5 u^2 S < 2^-42 S, within the bound above.
//
// float64: (n + 34) u S in fewer than 3 n + 64 additions, which is within the bound above, since
// (3 n + 64) (n + 34) < 4 (n + 62)^2 and n + 62 is at most what is squared there.
//
// Where something is subnormal a square loses at most 2^-150 more, and that times w in the product;
// the error of the product loses as much, and so does the addition of w times the square's error:
// (w + 2) 2^-150 in all, and (w + 2) 2^-1074 of float64. Weights from 2^20, or 2^100, are not
// certified; they become NaN here, and so do infinity, NaN, and what is negative, which no sum may
// be made of. So no more is lost than (2^20 + 2) 2^-150 count, which is nothing (2^-43) if the sum
// is at least 2^-86 count, or (2^100 + 2) 2^-1074 count, which is nothing (2^-113) if it is at least
// 2^-860 count. A product of numbers that are not 0 may be 0, so a sum that is 0 is not certified.

// w, or NaN where it is beyond what is certified; numbers of one sign are in the order of their bits.
__device__ inline float certifiable(float w) {
    return __float_as_uint(w) < __float_as_uint(0x1p20f) ? w : CUDART_NAN_F;
}
__device__ inline double certifiable(double w) {
    return integer(__double_as_longlong(w)) < integer(__double_as_longlong(0x1p100)) ? w : CUDART_NAN;
}

// The sum of one thread, a pair hi + lo in the end. Elements are added in groups.
template <typename C> struct lane;

template <> struct lane<float> {
    float sum = 0.0f, errors = 0.0f;  // of the group
    double hi = 0.0;
    static constexpr double lo = 0.0;

    __device__ inline void add(float x) {
        const float s = ::add(sum, x), rounded = subtract(s, sum);
        const float error = ::add(subtract(sum, subtract(s, rounded)), subtract(x, rounded));
        sum = s;
        errors = ::add(errors, error);
    }
    __device__ inline void add_absolute(float x, bool) { add(absolute(x)); }
    __device__ inline void add_square(float x, bool is_exact) {
        const float square = multiply(x, x);
        add(square);
        if (!is_exact) errors = ::add(errors, multiply_add(x, x, negative(square)));
    }
    __device__ inline void add_product(float a, float w) {
        const float product = multiply(a, w);
        add(product);
        errors = ::add(errors, multiply_add(a, w, negative(product)));
    }
    __device__ inline void add_absolute(float x, float w, bool) {
        add_product(absolute(x), certifiable(w));
    }
    __device__ inline void add_square(float x, float w, bool is_exact) {
        const float weight = certifiable(w), square = multiply(x, x);
        add_product(square, weight);
        if (is_exact) return;
        errors = multiply_add(multiply_add(x, x, negative(square)), weight, errors);
    }
    __device__ inline void end_group() {
        hi += widen(sum) + widen(errors);
        sum = errors = 0.0f;
    }
    __device__ inline void join(double other_hi, double) { hi += other_hi; }
    __device__ inline void join_lane(int distance) {
        join(__shfl_down_sync(~0u, hi, distance), 0.0);
    }
    __device__ static inline double bound(double count) { return 0x1p-38 + 0x1p-70 * count; }
    __device__ static inline double least(double count, int term, bool weighted) {
        return weighted ? 0x1p-86 * count : term == 1 ? 0.0 : 0x1p-106 * count;
    }
};

template <> struct lane<double> {
    double hi = 0.0, lo = 0.0;

    __device__ inline void join(double other_hi, double other_lo) {
        const double s = hi + other_hi, rounded = s - hi;
        const double error = (hi - (s - rounded)) + (other_hi - rounded);
        hi = s;
        lo += error + other_lo;
    }
    __device__ inline void add(double x) {
        const double s = hi + x, rounded = s - hi;
        lo += (hi - (s - rounded)) + (x - rounded);
        hi = s;
    }
    __device__ inline void add_absolute(double x, bool) { add(fabs(x)); }
    __device__ inline void add_square(double x, bool) {
        const double square = x * x;
        add(square);
        lo += fma(x, x, -square);
    }
    __device__ inline void add_product(double a, double w) {
        const double product = a * w;
        add(product);
        lo += fma(a, w, -product);
    }
    __device__ inline void add_absolute(double x, double w, bool) {
        add_product(fabs(x), certifiable(w));
    }
    __device__ inline void add_square(double x, double w, bool) {
        const double weight = certifiable(w), square = x * x;
        add_product(square, weight);
        lo = fma(fma(x, x, -square), weight, lo);
    }
    __device__ inline void end_group() {}
    __device__ inline void join_lane(int distance) {
        join(__shfl_down_sync(~0u, hi, distance), __shfl_down_sync(~0u, lo, distance));
    }
    __device__ static inline double bound(double count) {
        const double n = 0x1p-18 * count + 128.0;
        return 0x1p-104 * n * n;
    }
    __device__ static inline double least(double count, int, bool weighted) {
        return (weighted ? 0x1p-860 : 0x1p-960) * count;
    }
};

// Join the lanes of a block; the first thread has the sum.
template <typename C> __device__ inline void join_block(lane<C>& mine) {
    __shared__ double his[THREADS / 32], los[THREADS / 32];
    for (int distance = 16; distance > 0; distance /= 2) mine.join_lane(distance);
    __syncthreads();  // another sum may have been here before
    if (threadIdx.x % 32 == 0) {
        his[threadIdx.x / 32] = mine.hi;
        los[threadIdx.x / 32] = mine.lo;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < THREADS / 32; ++warp) mine.join(his[warp], los[warp]);
    }
}

template <typename C> __device__ inline void store(const lane<C>& sum, double* pair) {
    if (threadIdx.x == 0) {
        pair[0] = sum.hi;
        pair[1] = sum.lo;
    }
}

// Both ends of what the true sum may be. A sum of fewer threads than are taken for granted above, 1/n
// of them, is as far off as one of n times as many elements: that is `spread`.
struct bracket { double below, above; bool holds; };
template <typename C> __device__ inline bracket bracket_of(
    const lane<C>& sum, double count, int term, bool weighted, double spread = 1.0) {
    const double margin = 2.0 * lane<C>::bound(spread * count) * sum.hi;  // twice, to cover what it rounds
    const double below = sum.hi + (sum.lo - margin), above = sum.hi + (sum.lo + margin);
    const bool is_zero = term == 1 && !weighted && sum.hi == 0.0;
    const bool holds =
        isfinite(above) && (is_zero || sum.hi >= lane<C>::least(count, term, weighted));
    return {below, above, holds};
}
