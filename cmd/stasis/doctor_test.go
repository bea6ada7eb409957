package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/nri"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
)

const goodConfig = `version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.stasis]
  runtime_type = 'io.containerd.runc.v2'
  runtime_path = '/usr/local/bin/containerd-shim-stasis-v2'
`

func writeFile(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// healthyNode is a node on which every check is content.
func healthyNode(t *testing.T) *doctor {
	root, err := os.MkdirTemp("", "doc") // a socket's name must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	writeFile(t, filepath.Join(root, "proc/sys/kernel/ns_last_pid"), "1", 0o644)
	writeFile(t, filepath.Join(root, "proc/filesystems"), "nodev\ttmpfs\nnodev\toverlay\n", 0o644)
	writeFile(t, filepath.Join(root, "etc/containerd/config.toml"), goodConfig, 0o644)
	writeFile(t, filepath.Join(root, "usr/local/bin/containerd-shim-stasis-v2"), "", 0o755)
	writeFile(t, filepath.Join(root, "kubelet.yaml"), "shutdownGracePeriod: 0s\n", 0o644)
	if err := os.MkdirAll(filepath.Join(root, "store"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(root, "nri.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &doctor{
		fsRoot: root, storeRoot: "/store", containerdConfig: "/etc/containerd/config.toml", nriSocket: "/nri.sock", kubeletConfig: "/kubelet.yaml",
		criuVersion:  func(context.Context) (int, string, error) { return 40201, "4.2.1", nil },
		criuFeatures: func(context.Context) (criu.FeatureSet, error) { return criu.FeatureSet{LazyPages: true}, nil },
		output: func(_ context.Context, name string, _ ...string) (string, error) {
			if name == "runc" {
				return "runc version 1.3.6\nspec: 1.2.1\n", nil
			}
			return "containerd github.com/containerd/containerd/v2 v2.4.2 0123abc\n", nil
		},
		kernel: func() kernelFacts { return kernelFacts{cgroup: "unified"} },
		status: func(context.Context) (*nri.Status, error) {
			return &nri.Status{Version: "v1", Healthy: true, Connected: true, Runtime: "containerd v2.4.2", HostFacts: "ok"}, nil
		},
		freeBytes: func(string) (int64, bool, error) { return 100 << 30, false, nil },
		unit: func(_ context.Context, unit, kind, property string) (string, error) {
			return map[string]string{
				"stasis-prepare-reboot.service Unit ActiveState": "active", "stasis-prepare-reboot.service Unit UnitFileState": "enabled",
				"containerd.service Service KillMode": "process",
			}[unit+" "+kind+" "+property], nil
		},
		logindDelay: func(context.Context) (time.Duration, error) { return time.Minute, nil },
		targets:     func(context.Context) ([]reboot.Target, error) { return make([]reboot.Target, 2), nil },
	}
}

// unit makes systemd say something else of one property.
func unit(property, value string, err error) func(*testing.T, *doctor) {
	return func(_ *testing.T, d *doctor) {
		inner := d.unit
		d.unit = func(ctx context.Context, unit, kind, name string) (string, error) {
			if name == property {
				return value, err
			}
			return inner(ctx, unit, kind, name)
		}
	}
}

func TestDoctorNode(t *testing.T) {
	answer := func(s string, err error) func(context.Context, string, ...string) (string, error) {
		return func(context.Context, string, ...string) (string, error) { return s, err }
	}
	for name, tc := range map[string]struct {
		spoil func(t *testing.T, d *doctor)
		want  string // "level check: part of the detail"; empty: all is well
	}{
		"healthy": {func(*testing.T, *doctor) {}, ""},
		"old criu": {func(_ *testing.T, d *doctor) {
			d.criuVersion = func(context.Context) (int, string, error) { return 31700, "3.17", nil }
		}, "fail criu: 3.17"},
		"no criu": {func(_ *testing.T, d *doctor) {
			d.criuVersion = func(context.Context) (int, string, error) { return 0, "", exec.ErrNotFound }
		}, "fail criu: not found"},
		"no lazy pages": {func(_ *testing.T, d *doctor) {
			d.criuFeatures = func(context.Context) (criu.FeatureSet, error) { return criu.FeatureSet{}, nil }
		}, "warn criu features: lazy"},
		"no runc":         {func(_ *testing.T, d *doctor) { d.output = answer("", exec.ErrNotFound) }, "fail runc: not found"},
		"old runc":        {func(_ *testing.T, d *doctor) { d.output = answer("runc version 1.1.4", nil) }, "warn runc: 1.1.4"},
		"old containerd":  {func(_ *testing.T, d *doctor) { d.output = answer("containerd containerd.io 2.1.9 x", nil) }, "fail containerd: 2.1.9"},
		"no CR in kernel": {func(t *testing.T, d *doctor) { remove(t, d, "proc/sys/kernel/ns_last_pid") }, "fail kernel: CONFIG_CHECKPOINT_RESTORE"},
		"no kcmp": {func(_ *testing.T, d *doctor) {
			d.kernel = func() kernelFacts { return kernelFacts{kcmp: unix.EPERM, cgroup: "legacy"} }
		}, "fail kernel: kcmp"},
		"no userfaultfd": {func(_ *testing.T, d *doctor) {
			d.kernel = func() kernelFacts { return kernelFacts{userfaultfd: unix.ENOSYS, cgroup: "legacy"} }
		}, "warn kernel: userfaultfd"},
		"no freezer":       {func(_ *testing.T, d *doctor) { d.kernel = func() kernelFacts { return kernelFacts{} } }, "fail kernel: freezer"},
		"no overlay":       {func(t *testing.T, d *doctor) { remove(t, d, "proc/filesystems") }, "warn kernel: overlayfs"},
		"no nri socket":    {func(_ *testing.T, d *doctor) { d.nriSocket = "/etc/containerd/config.toml" }, "fail nri: no socket"},
		"no configuration": {func(t *testing.T, d *doctor) { remove(t, d, "etc/containerd/config.toml") }, "fail containerd config: no such file"},
		"bad configuration": {func(t *testing.T, d *doctor) {
			writeFile(t, d.path("etc/containerd/config.toml"), "[[", 0o644)
		}, "fail containerd config: config.toml"},
		"no handler": {func(t *testing.T, d *doctor) {
			writeFile(t, d.path("etc/containerd/config.toml"), "version = 3", 0o644)
		}, "fail containerd config: no runtime"},
		"handler in an import": {func(t *testing.T, d *doctor) {
			writeFile(t, d.path("etc/containerd/config.toml"), `imports = ["/etc/containerd/conf.d/*.toml"]`, 0o644)
			writeFile(t, d.path("etc/containerd/conf.d/stasis.toml"), goodConfig, 0o644)
		}, ""},
		"version 2 configuration": {func(t *testing.T, d *doctor) {
			writeFile(t, d.path("etc/containerd/config.toml"), strings.Replace(goodConfig, "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", 1), 0o644)
		}, ""},
		"nri disabled": {func(t *testing.T, d *doctor) {
			writeFile(t, d.path("etc/containerd/config.toml"), goodConfig+"[plugins.'io.containerd.nri.v1.nri']\n  disable = true\n", 0o644)
		}, "fail nri: disabled"},
		"no shim": {func(t *testing.T, d *doctor) { remove(t, d, "usr/local/bin/containerd-shim-stasis-v2") }, "fail containerd config: is no program"},
		"graceful shutdown": {func(t *testing.T, d *doctor) {
			writeFile(t, d.path("kubelet.yaml"), "shutdownGracePeriod: 30s\n", 0o644)
		}, "warn kubelet: graceful"},
		"graceful shutdown by priority": {func(t *testing.T, d *doctor) {
			writeFile(t, d.path("kubelet.yaml"), "shutdownGracePeriodByPodPriority:\n- priority: 0\n  shutdownGracePeriodSeconds: 60\n", 0o644)
		}, "warn kubelet: graceful"},
		"no kubelet": {func(t *testing.T, d *doctor) { remove(t, d, "kubelet.yaml") }, ""},
		"open store": {func(t *testing.T, d *doctor) {
			if err := os.Chmod(d.path("store"), 0o750); err != nil {
				t.Fatal(err)
			}
		}, "fail store: mode 0750"},
		"no store": {func(t *testing.T, d *doctor) { remove(t, d, "store") }, "fail store: no such file"},
		"full": {func(_ *testing.T, d *doctor) {
			d.freeBytes = func(string) (int64, bool, error) { return 1 << 20, false, nil }
		}, "fail free space: 1.0 MiB"},
		"nearly full": {func(_ *testing.T, d *doctor) {
			d.freeBytes = func(string) (int64, bool, error) { return 512 << 20, false, nil }
		}, "warn free space: 512.0 MiB"},
		"tmpfs": {func(_ *testing.T, d *doctor) {
			d.freeBytes = func(string) (int64, bool, error) { return 100 << 30, true, nil }
		}, "warn store: tmpfs"},
		"no daemon": {func(_ *testing.T, d *doctor) {
			d.status = func(context.Context) (*nri.Status, error) { return nil, errors.New("it does not answer") }
		}, "fail stasisd: does not answer"},
		"daemon without a runtime": {func(_ *testing.T, d *doctor) {
			d.status = func(context.Context) (*nri.Status, error) { return &nri.Status{Healthy: true, HostFacts: "ok"}, nil }
		}, "fail stasisd: not connected"},
		"no systemd":        {unit("ActiveState", "", fmt.Errorf("x: %w", reboot.ErrNoSystemd)), ""},
		"systemd is silent": {unit("ActiveState", "", errors.New("no answer")), "warn reboot: no answer"},
		"unit not active":   {unit("ActiveState", "inactive", nil), "warn reboot: inactive"},
		"unit not enabled":  {unit("UnitFileState", "disabled", nil), "warn reboot: disabled"},
		"no unit":           {unit("UnitFileState", "", nil), "warn reboot: not installed"},
		"kill mode":         {unit("KillMode", "control-group", nil), "fail reboot: KillMode=control-group"},
		"kill mode unknown": {unit("KillMode", "", errors.New("no answer")), "warn reboot: no answer"},
		"short delay": {func(_ *testing.T, d *doctor) {
			d.logindDelay = func(context.Context) (time.Duration, error) { return 5 * time.Second, nil }
		}, "warn reboot: for 5s only"},
		"no logind": {func(_ *testing.T, d *doctor) {
			d.logindDelay = func(context.Context) (time.Duration, error) { return 0, errors.New("no bus") }
		}, "warn reboot: no bus"},
		"old shim": {func(_ *testing.T, d *doctor) {
			d.targets = func(context.Context) ([]reboot.Target, error) {
				return []reboot.Target{{}, {Container: reboot.Container{ID: "4f5a", Err: errors.New("its shim is older")}}}, nil
			}
		}, "warn reboot: 1 of 2 opted-in containers cannot be dumped: 4f5a: its shim is older"},
		"no bundles": {func(_ *testing.T, d *doctor) {
			d.targets = func(context.Context) ([]reboot.Target, error) { return nil, os.ErrNotExist }
		}, "warn reboot: containers"},
		"daemon without facts": {func(_ *testing.T, d *doctor) {
			d.status = func(context.Context) (*nri.Status, error) {
				return &nri.Status{Healthy: true, Connected: true, HostFacts: "no criu"}, nil
			}
		}, "fail stasisd: no criu"},
	} {
		t.Run(name, func(t *testing.T) {
			d := healthyNode(t)
			tc.spoil(t, d)
			var wrong []string
			found := tc.want == ""
			for _, f := range d.node(context.Background()) {
				line := fmt.Sprintf("%s %s: %s", f.Level, f.Check, f.Detail)
				if f.Level != levelOK {
					wrong = append(wrong, line)
				}
				if f.Level != levelOK && f.Fix == "" {
					t.Errorf("no fix: %s", line)
				}
				head, part, _ := strings.Cut(tc.want, ": ")
				found = found || strings.HasPrefix(line, head+": ") && strings.Contains(f.Detail, part)
			}
			if !found || tc.want == "" && len(wrong) > 0 {
				t.Errorf("got %q, want %q", wrong, tc.want)
			}
		})
	}
}

func remove(t *testing.T, d *doctor, path string) {
	t.Helper()
	if err := os.Remove(d.path(path)); err != nil {
		t.Fatal(err)
	}
}

func TestParseCgroup(t *testing.T) {
	for in, want := range map[string]string{
		"0::/kubepods/pod1/abc\n":                     "/kubepods/pod1/abc",
		"12:memory:/m\n7:freezer:/k8s.io/abc\n0::/\n": "/k8s.io/abc",
		"3:cpu,freezer:/x\n":                          "/x",
		"0::/\n":                                      "",
		"garbage":                                     "",
	} {
		if got := parseCgroup(in); got != want {
			t.Errorf("parseCgroup(%q) = %q, want %q", in, got, want)
		}
	}
}

// fakeProcess makes /proc/PID of a process below root.
func fakeProcess(t *testing.T, root string, pid int, cgroup, pidNS, tracer string, fds ...string) {
	t.Helper()
	dir := filepath.Join(root, "proc", strconv.Itoa(pid))
	for _, sub := range []string{"fd", "ns"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(dir, "cgroup"), "0::"+cgroup+"\n", 0o644)
	writeFile(t, filepath.Join(dir, "status"), "Name:\tapp\nPPid:\t1\nTracerPid:\t"+tracer+"\nRssAnon:\t  1024 kB\nRssShmem:\t 1024 kB\n", 0o644)
	writeFile(t, filepath.Join(dir, "maps"), "7f00-7f01 rw-p 00000000 00:00 0 \n7f01-7f02 r--p 00000000 08:01 5   /usr/lib/x.so\n", 0o644)
	for n, target := range append(fds, "/dev/null") {
		if err := os.Symlink(target, filepath.Join(dir, "fd", strconv.Itoa(n))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("pid:["+pidNS+"]", filepath.Join(dir, "ns/pid")); err != nil {
		t.Fatal(err)
	}
}

func TestDoctorContainer(t *testing.T) {
	const id = "4f5a0e9d2c1b4f5a0e9d2c1b"
	for name, tc := range map[string]struct {
		cgroup, pidNS, tracer string
		shim, annotation      string
		fds                   []string
		free                  int64
		want                  string // check that fails, or is warned of
	}{
		"fit":          {cgroup: "/kubepods/pod1/" + id, want: ""},
		"fit, systemd": {cgroup: "/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope", want: ""},
		"stock shim":   {shim: "/usr/bin/containerd-shim-runc-v2", want: "container: opted in"},
		"no opt-in":    {annotation: "stasis.dev/policy", want: "container: opted in"},
		"io_uring":     {fds: []string{"anon_inode:[io_uring]"}, want: "container: io_uring"},
		"gpu":          {fds: []string{"/dev/nvidia0"}, want: "container: accelerators"},
		"render node":  {fds: []string{"/dev/dri/renderD128"}, want: "container: accelerators"},
		"device":       {fds: []string{"/dev/fuse"}, want: "container: devices"},
		"terminal":     {fds: []string{"/dev/pts/0", "/dev/shm/x", "/dev/urandom", "socket:[1]", "pipe:[2]"}, want: ""},
		"traced":       {tracer: "77", want: "container: ptrace"},
		"host pid":     {pidNS: "1", want: "container: pid namespace"},
		"too large":    {free: 65 << 20, want: "container: memory"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.cgroup == "" {
				tc.cgroup = "/kubepods/pod1/" + id
			}
			if tc.pidNS == "" {
				tc.pidNS = "2"
			}
			if tc.tracer == "" {
				tc.tracer = "0"
			}
			if tc.shim == "" {
				tc.shim = "/usr/local/bin/" + shimName
			}
			if tc.annotation == "" {
				tc.annotation = "stasis.dev/internal.policy"
			}
			if tc.free == 0 {
				tc.free = 1 << 40
			}
			d := &doctor{fsRoot: t.TempDir(), storeRoot: "/", freeBytes: func(string) (int64, bool, error) { return tc.free, false, nil }}
			fakeProcess(t, d.fsRoot, 1, "/", "1", "0")
			writeFile(t, filepath.Join(d.fsRoot, "proc/1/cmdline"), tc.shim+"\x00-namespace\x00k8s.io\x00", 0o644)
			writeFile(t, filepath.Join(d.fsRoot, bundles, id, "config.json"), `{"annotations": {"`+tc.annotation+`": "resume"}}`, 0o644)
			fakeProcess(t, d.fsRoot, 4000001, tc.cgroup, tc.pidNS, tc.tracer, tc.fds...)
			fakeProcess(t, d.fsRoot, 4000002, tc.cgroup+"/inner", tc.pidNS, "0")
			fakeProcess(t, d.fsRoot, 4000003, "/kubepods/pod1/other", "3", "0", "anon_inode:[io_uring]")
			for _, container := range []string{id, id[:8], "4000001"} {
				findings, err := d.container(container)
				if err != nil {
					t.Fatal(err)
				}
				got := ""
				for _, f := range findings {
					if f.Level != levelOK {
						got += f.Check
					}
				}
				if got != tc.want {
					t.Errorf("%s: %q, want %q: %+v", container, got, tc.want, findings)
				}
				if last := findings[len(findings)-1]; !strings.Contains(last.Detail, "4.0 MiB to dump") {
					t.Errorf("memory of two processes: %s", last.Detail)
				}
			}
			if _, err := d.container("ffffffffffff"); err == nil {
				t.Error("found a container that is not there")
			}
			if _, err := d.container("../../etc"); !errors.As(err, new(usageError)) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestMPTCP asks a real socket.
func TestMPTCP(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if err != nil {
		t.Fatalf("this kernel has no MPTCP: %v", err)
	}
	defer unix.Close(fd)
	tcp, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tcp)
	if !isMPTCP(os.Getpid(), fd) || isMPTCP(os.Getpid(), tcp) || isMPTCP(os.Getpid(), 0) {
		t.Errorf("mptcp %v, tcp %v, stdin %v", isMPTCP(os.Getpid(), fd), isMPTCP(os.Getpid(), tcp), isMPTCP(os.Getpid(), 0))
	}
}

// TestDoctorMerging: whether the kernel merges pages is told, and is no fault.
func TestDoctorMerging(t *testing.T) {
	for run, want := range map[string]string{"": "no CONFIG_KSM", "0\n": "KSM is off (/sys/kernel/mm/ksm/run is 0)", "1\n": "KSM is on", "2\n": "KSM is off"} {
		d := healthyNode(t)
		if run != "" {
			writeFile(t, d.path("sys/kernel/mm/ksm/run"), run, 0o644)
		}
		found := false
		for _, f := range d.checkKernel(context.Background()) {
			found = found || f.Check == "merging" && strings.Contains(f.Detail, want)
			if f.Level != levelOK {
				t.Errorf("run is %q: %+v", run, f)
			}
		}
		if !found {
			t.Errorf("run is %q: nothing tells %q", run, want)
		}
	}
}
