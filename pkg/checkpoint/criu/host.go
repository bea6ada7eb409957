package criu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// HostFactsFile is where the daemon leaves the facts of this boot for shims.
const HostFactsFile = "/run/stasis/host.json"

const maxHostFacts = 64 << 10

// userFlags are the flags of /proc/cpuinfo that name instructions or state
// which code in user space may have chosen to use when it started, and which it
// goes on using after a restore. Flags about the kernel's own use of the CPU,
// its power management, virtualization and mitigations are not among them:
// they come and go with kernels and firmware.
var userFlags = map[string][]string{
	"amd64": strings.Fields(`
		fpu tsc cx8 cmov clflush mmx fxsr sse sse2 syscall mmxext rdtscp 3dnow 3dnowext
		pni pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 sse4a movbe popcnt aes xsave xsaveopt xsavec xgetbv1
		avx f16c rdrand lahf_lm abm misalignsse xop fma4 tbm lwp 3dnowprefetch fsgsbase
		bmi1 bmi2 avx2 erms fsrm hle rtm mpx rdseed adx clflushopt clwb sha_ni sha512 sm3 sm4
		avx512f avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2
		avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect avx512_bf16
		avx512_fp16 avx_vnni avx_ifma avx_vnni_int8 avx_vnni_int16 avx_ne_convert avx10
		gfni vaes vpclmulqdq rdpid pku ospke waitpkg movdiri movdir64b cldemote serialize cmpccxadd clzero rdpru
		amx_tile amx_int8 amx_bf16 amx_fp16 prefetchi user_shstk`),
	"arm64": strings.Fields(`
		fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4
		asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg dcpodp sve2 sveaes svepmull
		svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh rng bti mte
		mte3 sme ecv rpres afp wfxt ebf16 cssc rprfm sve2p1 sme2 sme2p1 lrcpc3 lse128 mops hbc`),
}

// CPUFlags are the flags of this machine's CPUs on which code in user space can
// depend, sorted. It is the intersection over all CPUs.
func CPUFlags() ([]string, error) {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	flags, err := parseCPUFlags(f, userFlags[runtime.GOARCH])
	if err != nil {
		return nil, fmt.Errorf("/proc/cpuinfo: %w", err)
	}
	return flags, nil
}

func parseCPUFlags(r io.Reader, known []string) ([]string, error) {
	var common map[string]bool
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		name, value, _ := strings.Cut(s.Text(), ":")
		if name = strings.TrimSpace(name); name != "flags" && name != "Features" {
			continue
		}
		have := map[string]bool{}
		for _, f := range strings.Fields(value) {
			if common == nil || common[f] {
				have[f] = true
			}
		}
		common = have
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	var flags []string
	for _, f := range known {
		if common[f] {
			flags = append(flags, f)
		}
	}
	slices.Sort(flags)
	return flags, nil
}

// HostFacts collects what a restore must find again. It asks CRIU for its
// version and so starts a process: not for shims, see [ReadHostFacts].
func HostFacts(ctx context.Context) (checkpoint.Host, error) {
	_, version, err := Version(ctx)
	if err != nil {
		return checkpoint.Host{}, err
	}
	h := checkpoint.Host{Arch: runtime.GOARCH, CRIUVersion: version, CgroupMode: cgroupMode("/sys/fs/cgroup")}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return h, fmt.Errorf("uname: %w", err)
	}
	h.KernelRelease = unix.ByteSliceToString(u.Release[:])
	if h.BootID, err = checkpoint.BootID(); err != nil {
		return h, err
	}
	if h.CPUFlags, err = CPUFlags(); err != nil {
		return h, err
	}
	return h, nil
}

// cgroupMode is "unified" for cgroup v2 alone, "hybrid" for v1 with a v2
// hierarchy beside it, "legacy" for v1, "unknown" where nothing is mounted.
func cgroupMode(root string) string {
	isV2 := func(path string) bool {
		var st unix.Statfs_t
		return unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
	}
	var st unix.Statfs_t
	switch {
	case isV2(root):
		return "unified"
	case isV2(filepath.Join(root, "unified")):
		return "hybrid"
	case unix.Statfs(root, &st) == nil && st.Type == unix.TMPFS_MAGIC:
		return "legacy"
	}
	return "unknown"
}

// WriteHostFacts writes the facts for the shims of this node, mode 0600, in one
// step.
func WriteHostFacts(path string, h checkpoint.Host) error {
	b, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return fmt.Errorf("host facts: %w", err)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("host facts: %w", err)
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	if err := replaceAt(fd, filepath.Base(path), append(b, '\n')); err != nil {
		return fmt.Errorf("host facts %s: %w", path, err)
	}
	return nil
}

// ReadHostFacts reads what [WriteHostFacts] wrote. Facts of an earlier boot are
// refused: kernel and CPU may be others now. The error of an absent file wraps
// [checkpoint.ErrNotFound].
func ReadHostFacts(path string) (checkpoint.Host, error) {
	var h checkpoint.Host
	f, _, err := openRegular(unix.AT_FDCWD, path, maxHostFacts)
	if errors.Is(err, fs.ErrNotExist) {
		return h, fmt.Errorf("host facts %s: %w: %w", path, err, checkpoint.ErrNotFound)
	}
	if err != nil {
		return h, fmt.Errorf("host facts: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxHostFacts))
	if err != nil {
		return h, fmt.Errorf("host facts %s: %w", path, err)
	}
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&h); err != nil {
		return h, fmt.Errorf("host facts %s: %w: %w", path, err, checkpoint.ErrCorrupt)
	}
	boot, err := checkpoint.BootID()
	if err != nil {
		return h, err
	}
	if h.BootID != boot {
		return h, fmt.Errorf("host facts %s: of boot %q, this is boot %s: %w", path, h.BootID, boot, checkpoint.ErrIncompatible)
	}
	return h, nil
}

// CheckHost compares the facts recorded at a dump with those of this node. The
// error wraps [checkpoint.ErrIncompatible] and names the field. Another kernel,
// boot or cgroup mode is no obstacle: CRIU adapts to it.
func CheckHost(recorded, live checkpoint.Host) error {
	bad := func(field, format string, a ...any) error {
		return fmt.Errorf("%s: "+format+": %w", append(append([]any{field}, a...), checkpoint.ErrIncompatible)...)
	}
	if recorded.Arch == "" || recorded.Arch != live.Arch {
		return bad("arch", "dumped on %q, this is %q", recorded.Arch, live.Arch)
	}
	was, err := parseVersion(recorded.CRIUVersion)
	if err != nil {
		return bad("criuVersion", "recorded: %v", err)
	}
	is, err := parseVersion(live.CRIUVersion)
	if err != nil {
		return bad("criuVersion", "of this node: %v", err)
	}
	if slices.Compare(is, was) < 0 {
		return bad("criuVersion", "dumped by %s, here is the older %s", recorded.CRIUVersion, live.CRIUVersion)
	}
	if len(userFlags[recorded.Arch]) > 0 && len(recorded.CPUFlags) == 0 {
		return bad("cpuFlags", "none were recorded")
	}
	var missing []string
	for _, f := range recorded.CPUFlags {
		if slices.Contains(userFlags[recorded.Arch], f) && !slices.Contains(live.CPUFlags, f) {
			missing = append(missing, f)
		}
	}
	if len(missing) > 0 {
		return bad("cpuFlags", "this CPU lacks %s", strings.Join(missing, ", "))
	}
	return nil
}

// parseVersion reads "4.2.1" as [4 2 1] and "4.2" as [4 2 0].
func parseVersion(s string) ([]int, error) {
	v := make([]int, 3)
	parts := strings.Split(s, ".")
	if len(parts) < 2 || len(parts) > 3 {
		return nil, fmt.Errorf("version %q", s)
	}
	for i, p := range parts {
		n, err := strconv.Atoi(p)
		if err != nil || n < 0 || n > 9999 {
			return nil, fmt.Errorf("version %q", s)
		}
		v[i] = n
	}
	return v, nil
}
