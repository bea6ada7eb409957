package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/nri"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
)

// level is the outcome of a check.
type level string

const (
	levelOK   level = "ok"
	levelWarn level = "warn"
	levelFail level = "fail"
)

// finding is one line of the doctor's report.
type finding struct {
	Check  string `json:"check"`
	Level  level  `json:"level"`
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitempty"`
}

func ok(check, format string, a ...any) finding {
	return finding{Check: check, Level: levelOK, Detail: fmt.Sprintf(format, a...)}
}

func bad(l level, check, fix, format string, a ...any) finding {
	return finding{Check: check, Level: l, Fix: fix, Detail: fmt.Sprintf(format, a...)}
}

// doctor looks at one node. Files are looked for below fsRoot, and what
// programs and the kernel say comes from functions, so that a test can make
// any node it likes.
type doctor struct {
	fsRoot           string
	storeRoot        string
	runtimeDir       string
	containerdConfig string
	nriSocket        string
	kubeletConfig    string

	criuVersion  func(context.Context) (int, string, error)
	criuFeatures func(context.Context) (criu.FeatureSet, error)
	output       func(ctx context.Context, name string, args ...string) (string, error)
	kernel       func() kernelFacts
	status       func(context.Context) (*nri.Status, error)
	freeBytes    func(path string) (free int64, tmpfs bool, err error)
	unit         func(ctx context.Context, unit, kind, property string) (string, error) // see reboot.UnitProperty
	logindDelay  func(context.Context) (time.Duration, error)
	targets      func(context.Context) ([]reboot.Target, error)
}

// kernelFacts are what system calls say.
type kernelFacts struct {
	kcmp, userfaultfd error
	cgroup            string // as checkpoint.Host.CgroupMode
}

const (
	shimName = "containerd-shim-stasis-v2"
	minCRIU  = 40101
	// lowSpace is where a full store is near.
	lowSpace = 1 << 30
	minSpace = 64 << 20
)

func (c *cli) newDoctor() *doctor {
	return &doctor{
		fsRoot: "/", storeRoot: c.root, runtimeDir: c.runtimeDir,
		criuVersion: criu.Version, criuFeatures: criu.Features,
		output: func(ctx context.Context, name string, args ...string) (string, error) {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
			return string(out), err
		},
		kernel:    askKernel,
		status:    func(ctx context.Context) (*nri.Status, error) { return daemonStatus(ctx, c.runtimeDir) },
		freeBytes: freeBytes,
		unit:      reboot.UnitProperty,
		logindDelay: func(ctx context.Context) (time.Duration, error) {
			l, err := reboot.OpenLogind(ctx)
			if err != nil {
				return 0, err
			}
			defer l.Close()
			return l.MaxDelay(ctx)
		},
		targets: (&reboot.Node{ContainerdState: "/run/containerd"}).Look,
	}
}

func (c *cli) doctorCommand() *cobra.Command {
	d := c.newDoctor()
	var container string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check whether this node, and a container, are fit for checkpoints",
		Long: `doctor checks CRIU, runc, the kernel, the configuration of containerd and the
kubelet, the store, the daemon, and what a reboot that keeps the containers'
state needs. With --container it looks at a running container as well, for what
cannot be dumped: io_uring, MPTCP sockets, devices, a shared pid namespace,
ptrace, and more memory than the store has room for.

Each line is ok, warn or fail, and says how to mend it. doctor changes nothing.
It exits with 1 if any line is fail.`,
		Example: `  stasis doctor
  stasis doctor --container 4f5a0e9d2c1b
  stasis doctor --container 12345 -o json | jq '.[] | select(.level != "ok")'`,
		Args:              usage(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d.storeRoot, d.runtimeDir = c.root, c.runtimeDir
			findings := d.node(cmd.Context())
			if container != "" {
				f, err := d.container(container)
				if err != nil {
					return err
				}
				findings = append(findings, f...)
			}
			return c.printFindings(findings)
		},
	}
	f := cmd.Flags()
	f.StringVar(&container, "container", "", "ID of a running container, or the number of one of its processes")
	f.StringVar(&d.containerdConfig, "containerd-config", "/etc/containerd/config.toml", "containerd's configuration")
	f.StringVar(&d.nriSocket, "nri-socket", "/var/run/nri/nri.sock", "containerd's NRI socket")
	f.StringVar(&d.kubeletConfig, "kubelet-config", "/var/lib/kubelet/config.yaml", "the kubelet's configuration")
	return cmd
}

func (c *cli) printFindings(findings []finding) error {
	failed := false
	for _, f := range findings {
		failed = failed || f.Level == levelFail
	}
	if c.output == "json" {
		if err := c.printJSON(findings); err != nil {
			return err
		}
	} else {
		for _, f := range findings {
			fmt.Fprintf(c.out, "%-4s  %-20s  %s\n", f.Level, f.Check, strings.ReplaceAll(clean(f.Detail), "\n", " "))
			if f.Fix != "" {
				fmt.Fprintf(c.out, "%28sfix: %s\n", "", clean(f.Fix))
			}
		}
	}
	if failed {
		return errSilent
	}
	return nil
}

func (d *doctor) path(p string) string { return filepath.Join(d.fsRoot, p) }

// node is every check that is not about one container.
func (d *doctor) node(ctx context.Context) []finding {
	var all []finding
	for _, check := range []func(context.Context) []finding{
		d.checkCRIU, d.checkRunc, d.checkKernel, d.checkContainerd, d.checkKubelet, d.checkStore, d.checkDaemon, d.checkReboot,
	} {
		all = append(all, check(ctx)...)
	}
	return all
}

func (d *doctor) checkCRIU(ctx context.Context) []finding {
	const install = "install CRIU 4.1.1 or later, in the PATH of containerd and stasisd"
	n, version, err := d.criuVersion(ctx)
	if err != nil {
		return []finding{bad(levelFail, "criu", install, "%v", err)}
	}
	if n < minCRIU {
		return []finding{bad(levelFail, "criu", install, "version %s", version)}
	}
	fs := []finding{ok("criu", "version %s", version)}
	switch have, err := d.criuFeatures(ctx); {
	case err != nil:
		fs = append(fs, bad(levelFail, "criu features", "run criu check as root and mend what it names", "%v", err))
	case !have.LazyPages:
		fs = append(fs, bad(levelWarn, "criu features", "a kernel with CONFIG_USERFAULTFD and a CRIU built with it", "no lazy pages: memory is read before a container goes on, not while"))
	default:
		fs = append(fs, ok("criu features", "lazy pages; dirty page tracking: %v", have.MemTrack))
	}
	return fs
}

var versionNumber = regexp.MustCompile(`v?(\d+)\.(\d+)(?:\.\d+)?\S*`)

// parseVersion finds the first version in a program's answer.
func parseVersion(s string) (text string, major, minor int, found bool) {
	m := versionNumber.FindStringSubmatch(s)
	if m == nil {
		return "", 0, 0, false
	}
	major, _ = strconv.Atoi(m[1]) // digits only; one too long for an int is no version that matters
	minor, _ = strconv.Atoi(m[2])
	return m[0], major, minor, true
}

func (d *doctor) checkRunc(ctx context.Context) []finding {
	out, err := d.output(ctx, "runc", "--version")
	if err != nil {
		return []finding{bad(levelFail, "runc", "install runc 1.3 or later in the PATH of containerd", "%v", err)}
	}
	text, major, minor, found := parseVersion(out)
	if !found || major < 1 || major == 1 && minor < 2 {
		return []finding{bad(levelWarn, "runc", "install runc 1.3 or later", "version %q is older than what stasis is tested with", text)}
	}
	return []finding{ok("runc", "version %s", text)}
}

func askKernel() kernelFacts {
	var k kernelFacts
	self := uintptr(os.Getpid())
	const kcmpFile = 0
	if _, _, errno := unix.Syscall6(unix.SYS_KCMP, self, self, kcmpFile, 0, 0, 0); errno != 0 && errno != unix.EBADF {
		k.kcmp = errno
	}
	const userModeOnly = 1
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|userModeOnly, 0, 0)
	if errno != 0 {
		k.userfaultfd = errno
	} else {
		unix.Close(int(fd))
	}
	isType := func(path string, magic int64) bool {
		var st unix.Statfs_t
		return unix.Statfs(path, &st) == nil && int64(st.Type) == magic
	}
	switch {
	case isType("/sys/fs/cgroup", unix.CGROUP2_SUPER_MAGIC):
		k.cgroup = "unified"
	case isType("/sys/fs/cgroup/freezer", unix.CGROUP_SUPER_MAGIC):
		k.cgroup = "legacy"
	}
	return k
}

func (d *doctor) checkKernel(context.Context) []finding {
	var fs []finding
	const name = "kernel"
	// ns_last_pid exists with CONFIG_CHECKPOINT_RESTORE only (kernel: kernel/pid_namespace.c).
	if _, err := os.Stat(d.path("/proc/sys/kernel/ns_last_pid")); err != nil {
		fs = append(fs, bad(levelFail, name, "boot a kernel with CONFIG_CHECKPOINT_RESTORE=y", "no CONFIG_CHECKPOINT_RESTORE: %v", err))
	} else {
		fs = append(fs, ok(name, "CONFIG_CHECKPOINT_RESTORE"))
	}
	k := d.kernel()
	if k.kcmp != nil {
		fs = append(fs, bad(levelFail, name, "boot a kernel with CONFIG_KCMP=y; in a virtual machine or container, allow the system call", "kcmp: %v", k.kcmp))
	} else {
		fs = append(fs, ok(name, "kcmp"))
	}
	if k.userfaultfd != nil {
		fs = append(fs, bad(levelWarn, name, "boot a kernel with CONFIG_USERFAULTFD=y", "userfaultfd: %v", k.userfaultfd))
	} else {
		fs = append(fs, ok(name, "userfaultfd"))
	}
	if k.cgroup == "" {
		fs = append(fs, bad(levelFail, name, "mount cgroup v2, or v1 with the freezer controller", "no cgroup freezer: a container cannot be frozen"))
	} else {
		fs = append(fs, ok(name, "cgroup freezer (%s)", k.cgroup))
	}
	b, err := os.ReadFile(d.path("/proc/filesystems"))
	if err != nil || !bytes.Contains(b, []byte("\toverlay\n")) {
		fs = append(fs, bad(levelWarn, name, "modprobe overlay, and use containerd's overlayfs snapshotter", "overlayfs is not loaded"))
	} else {
		fs = append(fs, ok(name, "overlayfs"))
	}
	return append(fs, d.checkMerging())
}

// checkMerging tells of what is the operator's choice, so that nothing is wrong.
func (d *doctor) checkMerging() finding {
	const name = "merging"
	b, err := os.ReadFile(d.path("/sys/kernel/mm/ksm/run"))
	switch run := strings.TrimSpace(string(b)); {
	case errors.Is(err, fs.ErrNotExist):
		return ok(name, "the kernel has no CONFIG_KSM: %s has no effect", checkpoint.AnnotationMerge)
	case err != nil:
		return bad(levelWarn, name, "run doctor as root", "%v", err)
	case run == "1":
		return ok(name, "KSM is on: clones with %s share memory", checkpoint.AnnotationMerge)
	default: // 2: it also took apart what it had merged
		return ok(name, "KSM is off (/sys/kernel/mm/ksm/run is %s): clones with %s share no memory yet", run, checkpoint.AnnotationMerge)
	}
}

// containerdConfig is the part of containerd's configuration that matters, in
// versions 2 and 3.
type containerdConfig struct {
	Imports []string `toml:"imports"`
	Plugins map[string]struct {
		Disable    bool `toml:"disable"` // of NRI
		Containerd struct {
			DefaultRuntime string `toml:"default_runtime_name"`
			Runtimes       map[string]struct {
				Type string `toml:"runtime_type"`
				Path string `toml:"runtime_path"`
			} `toml:"runtimes"`
		} `toml:"containerd"`
	} `toml:"plugins"`
}

const maxConfig = 4 << 20

func readConfig(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxConfig {
		return nil, fmt.Errorf("%s is no regular file of at most %d bytes", path, maxConfig)
	}
	return io.ReadAll(io.LimitReader(f, maxConfig))
}

// readContainerd reads the configuration and what it imports, one level deep.
func (d *doctor) readContainerd() (configs []containerdConfig, err error) {
	b, err := readConfig(d.path(d.containerdConfig))
	if err != nil {
		return nil, err
	}
	var main containerdConfig
	if err := toml.Unmarshal(b, &main); err != nil {
		return nil, fmt.Errorf("%s: %w", d.containerdConfig, err)
	}
	configs = append(configs, main)
	for _, pattern := range main.Imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(d.containerdConfig), pattern)
		}
		files, err := filepath.Glob(d.path(pattern))
		if err != nil {
			return nil, fmt.Errorf("%s: import %q: %w", d.containerdConfig, pattern, err)
		}
		for _, file := range files {
			var c containerdConfig
			b, err := readConfig(file)
			if err == nil {
				err = toml.Unmarshal(b, &c)
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			configs = append(configs, c)
		}
	}
	return configs, nil
}

func (d *doctor) checkContainerd(ctx context.Context) []finding {
	var fs []finding
	if out, err := d.output(ctx, "containerd", "--version"); err != nil {
		fs = append(fs, bad(levelFail, "containerd", "install containerd 2.4 or later", "%v", err))
	} else if text, major, minor, found := parseVersion(out); !found || major < 2 || major == 2 && minor < 4 {
		fs = append(fs, bad(levelFail, "containerd", "install containerd 2.4 or later", "version %q does not tell the digest of a container's image: every container is left alone", text))
	} else {
		fs = append(fs, ok("containerd", "version %s", text))
	}
	if st, err := os.Stat(d.path(d.nriSocket)); err != nil || st.Mode().Type() != os.ModeSocket {
		fs = append(fs, bad(levelFail, "nri", "start containerd; its plugin io.containerd.nri.v1.nri must not be disabled", "no socket at %s", d.nriSocket))
	} else {
		fs = append(fs, ok("nri", "socket %s", d.nriSocket))
	}
	const merge = "merge contrib/containerd/stasis.toml into containerd's configuration and restart it"
	configs, err := d.readContainerd()
	if err != nil {
		return append(fs, bad(levelFail, "containerd config", merge, "%v", err))
	}
	found, defaultRuntime := map[string]string{}, ""
	for _, c := range configs {
		for name, p := range c.Plugins {
			if strings.HasSuffix(name, ".nri") && p.Disable {
				fs = append(fs, bad(levelFail, "nri", "set disable = false there and restart containerd", "disabled in the configuration, plugin %q", name))
			}
			if p.Containerd.DefaultRuntime != "" {
				defaultRuntime = p.Containerd.DefaultRuntime
			}
			for handler, r := range p.Containerd.Runtimes {
				if filepath.Base(r.Path) == shimName || r.Type == "io.containerd.stasis.v2" {
					found[handler] = r.Path
				}
			}
		}
	}
	if len(found) == 0 {
		return append(fs, bad(levelFail, "containerd config", merge, "no runtime in %s uses %s", d.containerdConfig, shimName))
	}
	for handler, path := range found {
		what := "for pods of that RuntimeClass"
		if handler == defaultRuntime {
			what = "the default"
		}
		if path == "" { // found by its type in containerd's PATH
			fs = append(fs, ok("containerd config", "runtime %q, %s", handler, what))
		} else if st, err := os.Stat(d.path(path)); err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
			fs = append(fs, bad(levelFail, "containerd config", "install the shim there, or correct runtime_path", "runtime %q: %s is no program", handler, path))
		} else {
			fs = append(fs, ok("containerd config", "runtime %q, %s, is %s", handler, what, path))
		}
	}
	return fs
}

func (d *doctor) checkKubelet(context.Context) []finding {
	const name = "kubelet"
	b, err := readConfig(d.path(d.kubeletConfig))
	if errors.Is(err, fs.ErrNotExist) {
		return []finding{ok(name, "no configuration at %s", d.kubeletConfig)}
	}
	var c struct {
		Grace    string `yaml:"shutdownGracePeriod"`
		Priority []any  `yaml:"shutdownGracePeriodByPodPriority"`
	}
	if err == nil {
		err = yaml.Unmarshal(b, &c)
	}
	if err != nil {
		return []finding{bad(levelWarn, name, "give the right file with --kubelet-config", "%v", err)}
	}
	grace, err := time.ParseDuration(c.Grace)
	if c.Grace != "" && err != nil {
		grace = 1 // it means something to the kubelet, perhaps
	}
	if grace != 0 || len(c.Priority) > 0 {
		return []finding{bad(levelWarn, name, "set shutdownGracePeriod: 0s, remove shutdownGracePeriodByPodPriority, and restart the kubelet",
			"graceful node shutdown is on: at a reboot the kubelet marks pods as failed, and they do not come back with their state")}
	}
	return []finding{ok(name, "graceful node shutdown is off")}
}

func freeBytes(path string) (int64, bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, false, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC, nil
}

func (d *doctor) checkStore(context.Context) []finding {
	const name = "store"
	path := d.path(d.storeRoot)
	st, err := os.Lstat(path)
	if err != nil {
		return []finding{bad(levelFail, name, "start stasisd, which makes it", "%v", err)}
	}
	if !st.IsDir() {
		return []finding{bad(levelFail, name, "remove it; stasisd makes a directory", "%s is no directory", d.storeRoot)}
	}
	var fs []finding
	var sys unix.Stat_t
	if err := unix.Lstat(path, &sys); err != nil {
		return []finding{bad(levelFail, name, "", "%s: %v", d.storeRoot, err)}
	}
	switch {
	case st.Mode().Perm() != 0o700:
		fs = append(fs, bad(levelFail, name, "chmod 700 "+d.storeRoot, "%s has mode %04o: it holds memory of containers, secrets included", d.storeRoot, st.Mode().Perm()))
	case int(sys.Uid) != os.Geteuid():
		fs = append(fs, bad(levelFail, name, "chown root:root "+d.storeRoot, "%s belongs to user %d", d.storeRoot, sys.Uid))
	default:
		fs = append(fs, ok(name, "%s, mode 0700", d.storeRoot))
	}
	free, tmpfs, err := d.freeBytes(path)
	const room = "stasis gc, or a larger file system"
	switch {
	case err != nil:
		fs = append(fs, bad(levelFail, "free space", "", "%v", err))
	case free < minSpace:
		fs = append(fs, bad(levelFail, "free space", room, "%s: nothing is dumped any more", size(free)))
	case free < lowSpace:
		fs = append(fs, bad(levelWarn, "free space", room, "%s", size(free)))
	default:
		fs = append(fs, ok("free space", "%s", size(free)))
	}
	if tmpfs {
		fs = append(fs, bad(levelWarn, name, "keep it on a disk", "%s is on a tmpfs: a reboot loses all checkpoints", d.storeRoot))
	}
	return fs
}

func (d *doctor) checkDaemon(ctx context.Context) []finding {
	const name = "stasisd"
	s, err := d.status(ctx)
	if err != nil {
		return []finding{bad(levelFail, name, "systemctl start stasisd", "%v", err)}
	}
	var fs []finding
	if !s.Healthy {
		fs = append(fs, bad(levelFail, name, "see its log; systemctl restart stasisd", "its main loop is stuck"))
	}
	if !s.Connected {
		fs = append(fs, bad(levelFail, name, "see its log, and whether containerd runs with NRI", "not connected to containerd: containers that are created now are ordinary ones"))
	}
	if s.HostFacts != "ok" {
		fs = append(fs, bad(levelFail, name, "install CRIU in its PATH; systemctl restart stasisd", "no host facts, so nothing can be dumped or restored: %s", s.HostFacts))
	}
	if len(fs) == 0 {
		fs = append(fs, ok(name, "version %s, connected to %s", s.Version, s.Runtime))
	}
	return fs
}

const (
	prepareUnit    = "stasis-prepare-reboot.service"
	containerdUnit = "containerd.service"
)

// checkReboot looks at what dumps the containers when the node goes down.
func (d *doctor) checkReboot(ctx context.Context) (fs []finding) {
	const name = "reboot"
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	switch active, err := d.unit(ctx, prepareUnit, "Unit", "ActiveState"); {
	case errors.Is(err, reboot.ErrNoSystemd):
		fs = append(fs, ok(name, "no systemd: only stasis prepare-reboot keeps the containers' state"))
	case err != nil:
		fs = append(fs, bad(levelWarn, name, "see whether systemd answers", "%v", err))
	default:
		fs = append(fs, d.checkUnits(ctx, active)...)
	}
	targets, err := d.targets(ctx)
	if err != nil {
		return append(fs, bad(levelWarn, name, "run containerd, as root", "containers: %v", err))
	}
	var unfit []string
	for _, t := range targets {
		if t.Err != nil {
			unfit = append(unfit, fmt.Sprintf("%s: %v", t.ID, t.Err))
		}
	}
	if len(unfit) > 0 {
		return append(fs, bad(levelWarn, name, "create the pods again; stasis prepare-reboot --dry-run says more", "%d of %d opted-in containers cannot be dumped: %s",
			len(unfit), len(targets), strings.Join(unfit, "; ")))
	}
	return append(fs, ok(name, "%d opted-in containers", len(targets)))
}

// checkUnits looks at a node that systemd runs; active is the state of our unit.
func (d *doctor) checkUnits(ctx context.Context, active string) (fs []finding) {
	const name = "reboot"
	enabled, err := d.unit(ctx, prepareUnit, "Unit", "UnitFileState")
	if err != nil || active != "active" || enabled != "enabled" {
		fs = append(fs, bad(levelWarn, name, "systemctl enable --now "+prepareUnit,
			"%s is %s and %s: a shutdown kills what stasisd has not dumped by then", prepareUnit, active, cmp.Or(enabled, "not installed")))
	} else {
		fs = append(fs, ok(name, "%s is active", prepareUnit))
	}
	switch mode, err := d.unit(ctx, containerdUnit, "Service", "KillMode"); {
	case err != nil:
		fs = append(fs, bad(levelWarn, name, "give the unit of containerd KillMode=process", "%v", err))
	case mode != "process" && mode != "none":
		fs = append(fs, bad(levelFail, name, "set KillMode=process in "+containerdUnit+", as containerd's own unit has it",
			"%s has KillMode=%s: its stop kills shims, and so all containers", containerdUnit, mode))
	default:
		fs = append(fs, ok(name, "%s has KillMode=%s", containerdUnit, mode))
	}
	const raise = "put contrib/systemd/logind-stasis.conf into /etc/systemd/logind.conf.d and restart systemd-logind"
	switch delay, err := d.logindDelay(ctx); {
	case err != nil:
		fs = append(fs, bad(levelWarn, name, "run systemd-logind and its bus; without them only "+prepareUnit+" dumps", "%v", err))
	case delay < reboot.MinDelay:
		fs = append(fs, bad(levelWarn, name, raise, "logind holds up a shutdown for %v only", delay))
	default:
		fs = append(fs, ok(name, "logind holds up a shutdown for %v", delay))
	}
	return fs
}
