package checkpoint

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Fingerprint maps the name of each compared part of a container's OCI spec to
// a hash of its value. Only what the application can notice is in it: not the
// container's id, the kubelet's attempt, cgroup paths, resource limits, the
// sources of mounts, or namespace paths.
type Fingerprint map[string]string

// ignoredEnv are set by the runtime from the pod's name and change with it.
var ignoredEnv = map[string]bool{"HOSTNAME": true}

// serviceLink reports whether a variable is one of the group that Kubernetes
// makes of each service: X_SERVICE_HOST, X_SERVICE_PORT, X_SERVICE_PORT_NAME,
// and, as Docker had it, X_PORT, X_PORT_80_TCP and X_PORT_80_TCP_PROTO, _PORT
// and _ADDR. All of them must look so, in order that a variable of the
// application's own, APP_PORT say, counts.
func serviceLink(env []string, entry string) bool {
	name, value, _ := strings.Cut(entry, "=")
	x := ""
	if i := strings.Index(name, "_SERVICE_PORT"); i > 0 {
		x = name[:i]
		if rest := name[i+len("_SERVICE_PORT"):]; rest != "" && rest[0] != '_' || !isPort(value) {
			return false
		}
	} else if own, ok := strings.CutSuffix(name, "_SERVICE_HOST"); ok {
		x = own
		if _, err := netip.ParseAddr(value); err != nil {
			return false
		}
	} else if own, ok := strings.CutSuffix(name, "_PORT"); ok && linkURL.MatchString(value) {
		x = own
	} else if m := linkName.FindStringSubmatch(name); m != nil {
		x = m[1]
	}
	if x == "" {
		return false
	}
	// The group has a head, and only Kubernetes writes both parts of it.
	host, port := false, false
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		switch name {
		case x + "_SERVICE_HOST":
			_, err := netip.ParseAddr(value)
			host = err == nil
		case x + "_SERVICE_PORT":
			port = isPort(value)
		}
	}
	return host && port
}

var (
	linkURL  = regexp.MustCompile(`^(tcp|udp|sctp)://`)
	linkName = regexp.MustCompile(`^(.+?)_PORT_[0-9]{1,5}_(?:TCP|UDP|SCTP)(?:_PROTO|_PORT|_ADDR)?$`)
)

func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}

// ComputeFingerprint takes the fingerprint of a container's spec. The variables
// do not count by which Kubernetes tells a container of the services that there
// are when it is created: one that runs on does not learn of newer ones either.
func ComputeFingerprint(s *specs.Spec) Fingerprint {
	f := Fingerprint{}
	put := func(name string, v any) {
		b, err := json.Marshal(v)
		if err != nil { // only channels, functions and the like cannot be marshalled
			panic(fmt.Sprintf("fingerprint of %s: %v", name, err))
		}
		sum := sha256.Sum256(b)
		f[name] = hex.EncodeToString(sum[:8])
	}
	if p := s.Process; p != nil {
		put("args", p.Args)
		put("cwd", p.Cwd)
		put("terminal", p.Terminal)
		put("user", p.User)
		put("capabilities", p.Capabilities)
		put("noNewPrivileges", p.NoNewPrivileges)
		put("apparmor", p.ApparmorProfile)
		put("selinux", p.SelinuxLabel)
		var env []string
		for _, e := range p.Env {
			name, _, _ := strings.Cut(e, "=")
			if !ignoredEnv[name] && !serviceLink(p.Env, e) {
				env = append(env, e)
			}
		}
		sort.Strings(env)
		put("env", env)
	}
	if s.Root != nil {
		put("readonlyRootfs", s.Root.Readonly)
	}
	type mount struct {
		Destination, Type string
		ReadOnly          bool
	}
	var mounts []mount
	for _, m := range s.Mounts {
		mounts = append(mounts, mount{m.Destination, m.Type, slices.Contains(m.Options, "ro") || slices.Contains(m.Options, "rro")})
	}
	sort.Slice(mounts, func(i, j int) bool { return mounts[i].Destination < mounts[j].Destination })
	put("mounts", mounts)
	if l := s.Linux; l != nil {
		put("seccomp", l.Seccomp)
		put("maskedPaths", l.MaskedPaths)
		put("readonlyPaths", l.ReadonlyPaths)
		put("sysctl", l.Sysctl)
		type ns struct {
			Type   specs.LinuxNamespaceType
			Joined bool
		}
		var nss []ns
		for _, n := range l.Namespaces {
			nss = append(nss, ns{n.Type, n.Path != ""})
		}
		sort.Slice(nss, func(i, j int) bool { return nss[i].Type < nss[j].Type })
		put("namespaces", nss)
		put("uidMappings", l.UIDMappings)
		put("gidMappings", l.GIDMappings)
		var devices []string
		for _, d := range l.Devices {
			devices = append(devices, fmt.Sprintf("%s %s %d:%d", d.Path, d.Type, d.Major, d.Minor))
		}
		sort.Strings(devices)
		put("devices", devices)
	}
	return f
}

// Diff lists the parts, sorted by name, in which the two fingerprints differ.
func (f Fingerprint) Diff(g Fingerprint) []string {
	var d []string
	for k, v := range f {
		if g[k] != v {
			d = append(d, k)
		}
	}
	for k := range g {
		if _, ok := f[k]; !ok {
			d = append(d, k)
		}
	}
	sort.Strings(d)
	return d
}
