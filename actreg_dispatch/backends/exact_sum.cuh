// Device functions of the CUDA backend: IEEE 754 arithmetic, and sums without a rounding error.
//
// CuPy compiles with -ftz=true, which would flush subnormal float32 numbers to zero and which no
// option undoes. So whatever touches float32 is stated in PTX. The other option that matters,
// --fmad=false, keeps multiplications and additions apart.

// Arithmetic.

// The type in which T is computed.
template <typename T> struct compute { using type = float; };
template <> struct compute<double> { using type = double; };

__device__ inline double widen(double x) { return x; }
__device__ inline double widen(float x) {
    double y;
    asm("cvt.f64.f32 %0, %1;" : "=d"(y) : "f"(x));
    return y;
}
__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(double x, float& y) {
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(y) : "d"(x));
}
__device__ inline double add(double x, double y) { return x + y; }
__device__ inline double multiply(double x, double y) { return x * y; }
__device__ inline double divide(double x, double y) { return x / y; }
__device__ inline float add(float x, float y) {
    float z;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ inline float multiply(float x, float y) {
    float z;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ inline float divide(float x, float y) {
    float z;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// What is added to the gradient at x, rounded after every operation.
template <typename C> __device__ inline C signed_strength(C x, C strength) {
    const double wide = widen(x);
    return wide > 0.0 ? strength : wide < 0.0 ? multiply(strength, C(-1)) : C(0);
}
template <typename C> __device__ inline C scaled(C x, C strength) {
    return multiply(multiply(strength, C(2)), x);
}
template <typename C> __device__ inline C both(C x, C strength, C second_strength) {
    return add(signed_strength(x, strength), scaled(x, second_strength));
}

// Digits: an integer of some 4,300 bits in global memory, in units of 2^-2148, the square of the
// smallest number. Digit k weighs 2^(DIGIT_BITS k) units. Its counter has 63 bits and a sign, so
// 2^37 amounts fit into it before anything is carried. Integers add up to the same in any order.

constexpr int INFINITIES = PLACES, NANS = PLACES + 1;  // two more counters follow the digits

using integer = unsigned long long;
constexpr integer DIGIT_MASK = (1ULL << DIGIT_BITS) - 1;

// Add amount, or subtract it.
__device__ inline void count(long long* counter, integer amount, bool negative = false) {
    if (amount != 0) atomicAdd(reinterpret_cast<integer*>(counter), negative ? -amount : amount);
}

// Count m * 2^shift units, m < 2^53. Moved by up to 25 bits, m has 78: PIECES digits, of which this
// is one.
constexpr int PIECES = 3;

__device__ inline void count_piece(
    int piece, integer m, int shift, long long* digits, bool negative = false) {
    const int right = DIGIT_BITS * piece - shift % DIGIT_BITS;
    const integer digit = right > 0 ? m >> right : m << -right;
    count(digits + shift / DIGIT_BITS + piece, digit & DIGIT_MASK, negative);
}

// |x| = m * 2^(shift - 1074), m < 2^53.
struct decoded { integer m; int shift; };
__device__ inline decoded decode(double x) {
    const integer bits = __double_as_longlong(fabs(x)), leading = 1ULL << 52;
    const int exponent = int(bits >> 52);
    if (exponent == 0) return {bits, 0};
    return {bits % leading + leading, exponent - 1};
}

__device__ inline void count_piece(int piece, double x, long long* digits) {
    const decoded d = decode(x);
    count_piece(piece, d.m, d.shift + 1074, digits, x < 0.0);
}

__device__ __noinline__ void count_number(double x, long long* digits) {
    for (int piece = 0; piece < PIECES; ++piece) count_piece(piece, x, digits);
}

// Add |x|^degree where x is infinite, NaN, or too large or small for what follows.
__device__ __noinline__ void count_outlier(double x, int degree, long long* digits) {
    if (!isfinite(x)) {
        count(digits + (isnan(x) ? NANS : INFINITIES), 1);
    } else if (degree == 1) {
        count_number(fabs(x), digits);
    } else {
        const decoded d = decode(x);
        const integer high = __umul64hi(d.m, d.m), low = d.m * d.m;
        for (int piece = 0; piece < PIECES; ++piece) {
            count_piece(piece, low % (1ULL << 53), 2 * d.shift, digits);
            count_piece(piece, high << 11 | low >> 53, 2 * d.shift + 53, digits);
        }
    }
}

// An exact sum: the value is the sum of the parts and of what went to the digits. TwoSum (Knuth)
// leaves a rounded sum and its error, without an error of its own. The error goes to the next
// part, in general as far as the first or second, where it is 0. What the last part cannot hold
// goes to the digits.
struct exact_sum {
    double part[PARTS] = {};

    __device__ inline void add(double x, long long* digits) {
#pragma unroll
        for (int k = 0; k < PARTS; ++k) {
            const double s = part[k] + x;
            const double x_rounded = s - part[k];
            x = (part[k] - (s - x_rounded)) + (x - x_rounded);
            part[k] = s;
            if (x == 0.0) return;
        }
        count_number(x, digits);
    }

    // A float32 is far from the limits of binary64, and so is its square, which is exact.
    __device__ inline void add_absolute(float x, long long* digits) {
        const double wide = widen(x);
        if (isfinite(wide)) {
            add(fabs(wide), digits);
        } else {
            count_outlier(wide, 1, digits);
        }
    }
    __device__ inline void add_square(float x, long long* digits) {
        const double wide = widen(x);
        if (isfinite(wide)) {
            add(wide * wide, digits);
        } else {
            count_outlier(wide, 2, digits);
        }
    }

    // Add |x|. The limit leaves room for 2^63 terms.
    __device__ inline void add_absolute(double x, long long* digits) {
        if (fabs(x) < 0x1p960) {
            add(fabs(x), digits);
        } else {
            count_outlier(x, 1, digits);
        }
    }

    // Add x * x, whose rounding error is a number too between the limits.
    __device__ inline void add_square(double x, long long* digits) {
        if (fabs(x) >= 0x1p-480 && fabs(x) < 0x1p480) {
            const double square = x * x;
            add(square, digits);
            add(fma(x, x, -square), digits);
        } else if (x != 0.0) {
            count_outlier(x, 2, digits);
        }
    }
};

// Add the sums of all the threads of a block to the digits.
__device__ inline void count_block(exact_sum& mine, long long* digits) {
    __shared__ double parts[PARTS][THREADS];
    const int t = threadIdx.x;
    __syncthreads();  // another sum may have been here before
#pragma unroll
    for (int k = 0; k < PARTS; ++k) parts[k][t] = mine.part[k];
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) {
#pragma unroll
            for (int k = 0; k < PARTS; ++k) mine.add(parts[k][t + half], digits);
#pragma unroll
            for (int k = 0; k < PARTS; ++k) parts[k][t] = mine.part[k];
        }
    }
    __syncthreads();
    if (t < PARTS * PIECES) count_piece(t % PIECES, parts[t / PIECES][0], digits);
}

// Results.

// The places of the digits, and the counters behind them, that are not 0.
struct places { int low, high; };
__device__ inline places either(const places& a, const places& b) {
    return {min(a.low, b.low), max(a.high, b.high)};
}

// The same by one thread.
__device__ inline places places_of(const long long* digits) {
    places used = {PLACES + 2, -1};
    for (int k = 0; k < PLACES + 2; ++k) {
        if (digits[k] != 0) used = either(used, places{k, k});
    }
    return used;
}

// x * 2^e where neither the result nor x * 2^(e/2) is subnormal or infinite.
__device__ inline double power_of_two(int e) {
    return __longlong_as_double((long long)(1023 + e) << 52);
}
__device__ inline double scale(double x, int e) {
    return x * power_of_two(e / 2) * power_of_two(e - e / 2);
}

// A sum rounded to 53 bits, its exponent unbounded: significand * 2^exponent, where the
// significand is 0, an integer of 53 bits, infinity or NaN.
struct rounded_sum {
    double significand;
    int exponent;

    // Round the sum in the digits to nearest, to even on a tie.
    __device__ inline rounded_sum(const long long* digits, const places& used)
        : significand(0.0), exponent(0) {
        if (used.high >= PLACES) {
            significand = digits[NANS] ? nan("") : CUDART_INF;
            return;
        }
        int canonical[PLACES], top = used.low;
        long long carry = 0;
        for (; top < PLACES && (top <= used.high || carry != 0); ++top) {
            carry += top <= used.high ? digits[top] : 0;
            canonical[top] = int(carry & (long long)DIGIT_MASK);
            carry >>= DIGIT_BITS;
        }
        do --top; while (top >= used.low && canonical[top] == 0);
        if (top < used.low) return;
        // The first 64 bits are in four digits; the last of the bits stands for all that follow.
        integer window[4];
        for (int k = 0; k < 4; ++k) {
            window[k] = top - k >= used.low ? canonical[top - k] : 0;
        }
        const int empty = __clzll(window[0]) - (64 - DIGIT_BITS), cut = 40 - empty;
        const integer upper = window[0] << DIGIT_BITS | window[1];
        const integer lower = window[2] << DIGIT_BITS | window[3];
        bool more = lower % (1ULL << cut) != 0;
        for (int k = used.low; k <= top - 4; ++k) more = more || canonical[k] != 0;
        const integer bits = upper << (12 + empty) | lower >> cut | more;
        const integer half = 1 << 10, tail = bits % (2 * half), kept = bits / (2 * half);
        significand = double(kept + (tail > half || (tail == half && kept % 2)));
        exponent = DIGIT_BITS * (top - 1) - 1 - empty - 2148;
    }

    // Return the product with lam, rounded to binary64 once.
    __device__ inline double times(double lam) const {
        if (!isfinite(significand) || significand == 0.0 || lam == 0.0) return lam * significand;
        // Both factors as 1 to 2 times a power of two, half of which goes to either.
        const double normal = lam < 0x1p-1000 ? lam * 0x1p100 : lam;
        const int lam_exponent = (__double_as_longlong(normal) >> 52) - 1023;
        const int total = lam_exponent - (lam < 0x1p-1000 ? 100 : 0) + exponent + 52;
        if (total > 1100) return CUDART_INF;
        if (total < -1200) return 0.0;
        const double a = scale(normal, -lam_exponent), b = scale(significand, -52);
        return scale(a, total / 2) * scale(b, total - total / 2);
    }

    // Return the square root, rounded to binary64 once.
    __device__ inline double root() const {
        if (!isfinite(significand)) return significand;
        const bool odd = exponent % 2;
        const double even = odd ? 2.0 * significand : significand;
        const int e = exponent - odd;
        if (e > 2000) return CUDART_INF;
        if (e >= -2096) return scale(sqrt(even), e / 2);
        // A subnormal root is a multiple of 2^-1074, whose square is the unit here. The remainder
        // tells whether root + 1/2 is exceeded; root + 1/2 itself is the root of no integer.
        const double square = scale(even, e + 2148), root = floor(__dsqrt_rz(square));
        const bool up = fma(-root, root, square) > root;
        return __longlong_as_double((long long)root + up);
    }

    // Whether it is larger than epsilon; NaN counts as larger.
    __device__ inline bool exceeds(double epsilon) const {
        if (!isfinite(significand)) return true;
        if (significand == 0.0) return false;
        if (exponent >= -1074) return times(1.0) > epsilon;
        return epsilon < 0x1p-900 && scale(significand, exponent + 1200) > scale(epsilon, 1200);
    }
};

template <typename C> __device__ inline void finish(
    const places& used, const long long* digits, double lam, C& penalty) {
    narrow(rounded_sum(digits, used).times(lam), penalty);
}

// For two sums: the digits of the second follow those of the first.
template <typename C> __device__ inline void finish_both(
    const places& used, const long long* digits, double lam, double second_lam, C& penalty) {
    const long long* second = digits + PLACES + 2;
    const double product = rounded_sum(digits, used).times(lam);
    narrow(product + rounded_sum(second, places_of(second)).times(second_lam), penalty);
}

// For L2. The divisor is the norm, or 0 where there is no gradient.
template <typename C> __device__ inline void finish_l2(
    const places& used, const long long* digits, double lam, double epsilon, C& penalty,
    C& divisor) {
    const rounded_sum sum(digits, used);
    const double norm = sum.root();
    narrow(lam * norm, penalty);
    narrow(sum.exceeds(epsilon) ? norm : 0.0, divisor);
}
