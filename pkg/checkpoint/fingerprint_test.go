package checkpoint_test

import (
	"encoding/json"
	"os"
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func spec() *specs.Spec {
	limit := int64(1 << 30)
	return &specs.Spec{
		Hostname:    "pod-0",
		Annotations: map[string]string{"io.kubernetes.cri.sandbox-id": "abc"},
		Process: &specs.Process{
			Args: []string{"/app", "-x"}, Cwd: "/srv", Env: []string{"PATH=/bin", "HOSTNAME=pod-0", "A=1"},
			User:         specs.User{UID: 1000, GID: 1000},
			Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN"}},
		},
		Root: &specs.Root{Path: "/run/a/rootfs", Readonly: true},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid"}},
			{Destination: "/data", Type: "bind", Source: "/var/lib/kubelet/pods/1/volumes/data", Options: []string{"rbind", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "kubepods/pod1/abc",
			Resources:   &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}},
			Namespaces:  []specs.LinuxNamespace{{Type: "network", Path: "/proc/1/ns/net"}, {Type: "pid"}},
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
			Sysctl:  map[string]string{"net.core.somaxconn": "1", "kernel.msgmax": "2"},
			Devices: []specs.LinuxDevice{{Path: "/dev/a", Type: "c", Major: 1, Minor: 2}, {Path: "/dev/b", Type: "c", Major: 1, Minor: 3}},
			Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActErrno},
		},
	}
}

// TestFingerprint: each change is seen in the part that it belongs to, or not
// at all where the application cannot notice it.
func TestFingerprint(t *testing.T) {
	base := checkpoint.ComputeFingerprint(spec())
	for name, test := range map[string]struct {
		change func(s *specs.Spec)
		want   []string
	}{
		"nothing":           {func(s *specs.Spec) {}, nil},
		"args":              {func(s *specs.Spec) { s.Process.Args[1] = "-y" }, []string{"args"}},
		"args split":        {func(s *specs.Spec) { s.Process.Args = []string{"/app -x"} }, []string{"args"}},
		"cwd":               {func(s *specs.Spec) { s.Process.Cwd = "/" }, []string{"cwd"}},
		"terminal":          {func(s *specs.Spec) { s.Process.Terminal = true }, []string{"terminal"}},
		"user":              {func(s *specs.Spec) { s.Process.User.UID = 0 }, []string{"user"}},
		"extra group":       {func(s *specs.Spec) { s.Process.User.AdditionalGids = []uint32{7} }, []string{"user"}},
		"capability":        {func(s *specs.Spec) { s.Process.Capabilities.Ambient = []string{"CAP_CHOWN"} }, []string{"capabilities"}},
		"no new privileges": {func(s *specs.Spec) { s.Process.NoNewPrivileges = true }, []string{"noNewPrivileges"}},
		"apparmor":          {func(s *specs.Spec) { s.Process.ApparmorProfile = "x" }, []string{"apparmor"}},
		"selinux":           {func(s *specs.Spec) { s.Process.SelinuxLabel = "x" }, []string{"selinux"}},
		"env":               {func(s *specs.Spec) { s.Process.Env[2] = "A=2" }, []string{"env"}},
		"env added":         {func(s *specs.Spec) { s.Process.Env = append(s.Process.Env, "B=") }, []string{"env"}},
		"writable rootfs":   {func(s *specs.Spec) { s.Root.Readonly = false }, []string{"readonlyRootfs"}},
		"mount read-write":  {func(s *specs.Spec) { s.Mounts[1].Options = []string{"rbind", "rw"} }, []string{"mounts"}},
		"mount elsewhere":   {func(s *specs.Spec) { s.Mounts[1].Destination = "/data2" }, []string{"mounts"}},
		"mount gone":        {func(s *specs.Spec) { s.Mounts = s.Mounts[:1] }, []string{"mounts"}},
		"seccomp":           {func(s *specs.Spec) { s.Linux.Seccomp.DefaultAction = specs.ActAllow }, []string{"seccomp"}},
		"seccomp gone":      {func(s *specs.Spec) { s.Linux.Seccomp = nil }, []string{"seccomp"}},
		"masked path":       {func(s *specs.Spec) { s.Linux.MaskedPaths = nil }, []string{"maskedPaths"}},
		"read-only path":    {func(s *specs.Spec) { s.Linux.ReadonlyPaths = nil }, []string{"readonlyPaths"}},
		"sysctl":            {func(s *specs.Spec) { s.Linux.Sysctl["kernel.msgmax"] = "3" }, []string{"sysctl"}},
		"namespace":         {func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[:1] }, []string{"namespaces"}},
		"namespace joined":  {func(s *specs.Spec) { s.Linux.Namespaces[1].Path = "/proc/1/ns/pid" }, []string{"namespaces"}},
		"device":            {func(s *specs.Spec) { s.Linux.Devices[0].Minor = 9 }, []string{"devices"}},
		"uid mapping":       {func(s *specs.Spec) { s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}} }, []string{"uidMappings"}},
		"gid mapping":       {func(s *specs.Spec) { s.Linux.GIDMappings = []specs.LinuxIDMapping{{Size: 1}} }, []string{"gidMappings"}},
		"two parts":         {func(s *specs.Spec) { s.Process.Cwd, s.Process.Args[0] = "/", "/b" }, []string{"args", "cwd"}},
		"no process": {func(s *specs.Spec) { s.Process = nil }, []string{
			"apparmor", "args", "capabilities", "cwd", "env", "noNewPrivileges", "selinux", "terminal", "user"}},

		"hostname":       {func(s *specs.Spec) { s.Hostname, s.Process.Env[1] = "pod-1", "HOSTNAME=pod-1" }, nil},
		"annotations":    {func(s *specs.Spec) { s.Annotations["io.kubernetes.cri.sandbox-id"] = "def" }, nil},
		"order of env":   {func(s *specs.Spec) { slices.Reverse(s.Process.Env) }, nil},
		"rootfs's path":  {func(s *specs.Spec) { s.Root.Path = "/run/b/rootfs" }, nil},
		"mount's source": {func(s *specs.Spec) { s.Mounts[1].Source = "/var/lib/kubelet/pods/2/volumes/data" }, nil},
		"mount order":    {func(s *specs.Spec) { slices.Reverse(s.Mounts) }, nil},
		"device order":   {func(s *specs.Spec) { slices.Reverse(s.Linux.Devices) }, nil},
		"cgroup":         {func(s *specs.Spec) { s.Linux.CgroupsPath = "x" }, nil},
		"limits":         {func(s *specs.Spec) { s.Linux.Resources = nil }, nil},
		"sandbox":        {func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/proc/2/ns/net" }, nil},
		"ns order":       {func(s *specs.Spec) { slices.Reverse(s.Linux.Namespaces) }, nil},
	} {
		s := spec()
		test.change(s)
		f := checkpoint.ComputeFingerprint(s)
		if got := base.Diff(f); !slices.Equal(got, test.want) {
			t.Errorf("%s: differs in %q, want %q", name, got, test.want)
		}
		if got := f.Diff(base); !slices.Equal(got, test.want) {
			t.Errorf("%s: the other way round differs in %q, want %q", name, got, test.want)
		}
	}
	if got := checkpoint.ComputeFingerprint(&specs.Spec{}); len(base.Diff(got)) == 0 {
		t.Error("an empty spec fits")
	}
}

// TestFingerprintStays: fingerprints lie on disk, so another version of this
// code must compute the same.
func TestFingerprintStays(t *testing.T) {
	data, err := os.ReadFile("testdata/fingerprint.json")
	if err != nil {
		t.Fatal(err)
	}
	var want checkpoint.Fingerprint
	if err := json.Unmarshal(data, &want); err != nil {
		t.Fatal(err)
	}
	got := checkpoint.ComputeFingerprint(spec())
	if d := want.Diff(got); len(d) != 0 || len(want) != 19 {
		out, _ := json.MarshalIndent(got, "", "  ")
		t.Errorf("differs in %q from what is recorded:\n%s", d, out)
	}
}

// TestServiceLinks: of the environment only what Kubernetes says of services does
// not count.
func TestServiceLinks(t *testing.T) {
	head := []string{"DB_SERVICE_HOST=10.0.0.1", "DB_SERVICE_PORT=5432"}
	rest := []string{"DB_SERVICE_PORT_PG=5432", "DB_PORT=tcp://10.0.0.1:5432", "DB_PORT_5432_TCP=tcp://10.0.0.1:5432",
		"DB_PORT_5432_TCP_PROTO=tcp", "DB_PORT_5432_TCP_PORT=5432", "DB_PORT_5432_TCP_ADDR=10.0.0.1"}
	base := checkpoint.ComputeFingerprint(spec())
	for name, test := range map[string]struct {
		env  []string // added
		same bool
	}{
		"nothing":               {nil, true},
		"a service":             {slices.Concat(head, rest), true},
		"in another order":      {slices.Concat(rest, head), true},
		"IPv6":                  {[]string{"DB_SERVICE_HOST=fd00::1", "DB_SERVICE_PORT=5432", "DB_PORT_5432_UDP=udp://[fd00::1]:5432"}, true},
		"no head":               {rest, false},
		"no host":               {slices.Concat(head[1:], rest), false},
		"host is a name":        {[]string{"DB_SERVICE_HOST=db.example.com", "DB_SERVICE_PORT=5432"}, false},
		"port is a name":        {[]string{"DB_SERVICE_HOST=10.0.0.1", "DB_SERVICE_PORT=pg"}, false},
		"one's own port":        {[]string{"APP_PORT=8080"}, false},
		"own port of a service": {slices.Concat(head, []string{"DB_PORT=8080"}), false},
		"another's":             {slices.Concat(head, []string{"APP_PORT=tcp://10.0.0.1:5432"}), false},
		"like a port":           {slices.Concat(head, []string{"DB_SERVICE_PORTS=1"}), false},
		"no name":               {[]string{"_SERVICE_HOST=10.0.0.1", "_SERVICE_PORT=1"}, false},
		"one's own":             {slices.Concat(head, []string{"B=1"}), false},
		"number too large":      {slices.Concat(head, []string{"DB_PORT_543200_TCP=tcp://10.0.0.1:543200"}), false},
	} {
		s := spec()
		s.Process.Env = append(s.Process.Env, test.env...)
		d := base.Diff(checkpoint.ComputeFingerprint(s))
		if (len(d) == 0) != test.same || len(d) > 0 && d[0] != "env" {
			t.Errorf("%s: differs in %q", name, d)
		}
	}
}
