package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The repositories that critest names, below its registries.
const (
	e2e     = "e2e-test-images/"
	staging = "k8s-staging-cri-tools/"
)

// spec is an image to build: a stack of trees, how to start it, and the names it goes by.
type spec struct {
	names  []string
	trees  []*tree
	config v1.Config
}

// builder makes the images' trees. The first error sticks and is returned at the end.
type builder struct {
	rootfs, bin, java, tomcat string
	err                       error
}

func (b *builder) tree(fill func(t *tree), debian ...string) *tree {
	t := newTree(b.rootfs)
	if err := t.add(debian...); err != nil && b.err == nil {
		b.err = err
	}
	if fill != nil {
		fill(t)
	}
	return t
}

func (b *builder) read(file string) []byte {
	data, err := os.ReadFile(file)
	if err != nil && b.err == nil {
		b.err = err
	}
	return data
}

// glob lists what matches the patterns in the root file system, relative to it.
func (b *builder) glob(patterns ...string) []string {
	var names []string
	for _, p := range patterns {
		found, err := fs.Glob(os.DirFS(b.rootfs), p)
		if err != nil && b.err == nil {
			b.err = err
		}
		names = append(names, found...)
	}
	return names
}

// base is a small system: users, a merged /usr, and busybox under all its names.
func (b *builder) base() *tree {
	busybox := filepath.Join(b.rootfs, "usr/bin/busybox")
	applets, err := exec.Command(busybox, "--list-full").Output()
	if err != nil && b.err == nil {
		b.err = fmt.Errorf("listing busybox's commands: %w", err)
	}
	return b.tree(func(t *tree) {
		for _, dir := range []string{"dev", "etc", "proc", "run", "sys", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "var/log", "var/lib"} {
			t.dir(dir, 0o755, 0, 0)
		}
		t.dir("root", 0o700, 0, 0)
		t.dir("tmp", 0o1777, 0, 0)
		for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
			t.symlink(dir, "usr/"+dir)
		}
		t.symlink("var/run", "/run")
		t.file("etc/passwd", 0o644, []byte(`root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/:/bin/false
default-user:x:1000:1000::/:/bin/sh
`))
		t.file("etc/group", 0o644, []byte(`root:x:0:
daemon:x:1:
www-data:x:33:
nogroup:x:65534:
default-user:x:1000:
group-defined-in-image:x:50000:default-user
`))
		// Hard links: with symlinks, masking one command's path would mask them all.
		for _, name := range strings.Fields(string(applets)) {
			if name = real(name); name == "linuxrc" || name == "usr/bin/busybox" {
				continue
			}
			t.hardlink(name, "usr/bin/busybox")
		}
	}, "usr/bin/busybox")
}

func (b *builder) specs() []spec {
	shell := v1.Config{Cmd: []string{"sh"}}
	busybox := b.base()
	// What the conformance tests run and this busybox lacks.
	critest := b.tree(nil, "usr/bin/ipcs", "usr/bin/pgrep")

	redis := b.tree(func(t *tree) { t.dir("data", 0o755, 0, 0) }, "usr/bin/redis-server", "usr/bin/redis-cli")

	nginx := func(port int) *tree {
		return b.tree(func(t *tree) {
			t.dir("var/lib/nginx", 0o755, 0, 0)
			t.dir("var/log/nginx", 0o755, 0, 0)
			t.file("usr/share/nginx/html/index.html", 0o644, []byte("<h1>Welcome to nginx!</h1>\n"))
			t.file("etc/nginx/nginx.conf", 0o644, fmt.Appendf(nil, `user www-data;
worker_processes 2;
pid /var/run/nginx.pid;
error_log /dev/stderr;
events { worker_connections 256; }
http {
	include mime.types;
	access_log /dev/stdout;
	server {
		listen %d;
		root /usr/share/nginx/html;
	}
}
`, port))
		}, "usr/sbin/nginx", "etc/nginx/mime.types")
	}
	nginxConfig := v1.Config{Cmd: []string{"nginx", "-g", "daemon off;"}, StopSignal: "SIGQUIT"}

	httpd := b.tree(func(t *tree) {
		t.put("usr/sbin/httpd", t.entries["usr/sbin/apache2"].Header, t.entries["usr/sbin/apache2"].data)
		delete(t.entries, "usr/sbin/apache2")
		t.file("usr/share/httpd/index.html", 0o644, []byte("<html><body><h1>It works!</h1></body></html>\n"))
		t.file("etc/apache2/apache2.conf", 0o644, []byte(`ServerName localhost
Listen 80
PidFile /run/httpd.pid
User www-data
Group www-data
ErrorLog /dev/stderr
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule dir_module /usr/lib/apache2/modules/mod_dir.so
DocumentRoot /usr/share/httpd
`))
	}, "usr/sbin/apache2", "usr/lib/apache2/modules/mod_mpm_event.so", "usr/lib/apache2/modules/mod_authz_core.so", "usr/lib/apache2/modules/mod_dir.so")

	python := b.tree(nil, append(b.glob("usr/lib/python3*", "etc/python3*"), "usr/bin/python3")...)

	// Java runtimes made by jlink, with the one service that each runs. Their libraries find each other.
	jvm := func(from, to string) *tree {
		return b.tree(func(t *tree) {
			if err := t.copy(from, to); err != nil && b.err == nil {
				b.err = err
			}
		}, append(b.glob("usr/lib/*-linux-gnu/libc.so.6", "usr/lib/*-linux-gnu/libz.so.1", "usr/lib/*-linux-gnu/libstdc++.so.6"), "usr/lib64/ld-linux-x86-64.so.2")...)
	}
	java, tomcat := jvm(b.java, "opt/java"), jvm(b.tomcat, "")

	nnp := b.tree(func(t *tree) { t.file("nonewprivs", 0o4755, b.read(filepath.Join(b.bin, "nonewprivs"))) })
	pause := b.tree(func(t *tree) { t.file("pause", 0o755, b.read(filepath.Join(b.bin, "pause"))) })

	marked := func(name string) *tree {
		return b.tree(func(t *tree) { t.file(name, 0o644, []byte(name+"\n")) })
	}
	specs := []spec{
		{[]string{"busybox:latest", "busybox:1.0"}, []*tree{busybox}, shell},
		{[]string{"pause:latest"}, []*tree{pause}, v1.Config{Entrypoint: []string{"/pause"}, User: "65534:65534"}},
		{[]string{"redis:latest"}, []*tree{busybox, redis}, v1.Config{
			Cmd:        []string{"redis-server", "--protected-mode", "no", "--save", "", "--dir", "/data"},
			WorkingDir: "/data",
		}},
		{[]string{"nginx:latest", e2e + "nginx:1.14-2"}, []*tree{busybox, critest, nginx(80)}, nginxConfig},
		{[]string{staging + "hostnet-nginx-amd64:latest"}, []*tree{busybox, critest, nginx(12003)}, nginxConfig},
		{[]string{"python:latest"}, []*tree{busybox, python}, v1.Config{Cmd: []string{"python3"}, Env: []string{"PYTHONDONTWRITEBYTECODE=1"}}},

		{[]string{"java:latest"}, []*tree{busybox, java}, v1.Config{Entrypoint: []string{"/opt/java/bin/java"}, Cmd: []string{"-cp", "/opt/java/classes", "Warm"}}},
		{[]string{"tomcat:latest"}, []*tree{busybox, tomcat}, v1.Config{Entrypoint: []string{"/opt/java/bin/java"}, Cmd: []string{
			"-cp", "/usr/share/tomcat11/bin/bootstrap.jar:/usr/share/tomcat11/bin/tomcat-juli.jar", "-Dcatalina.home=/usr/share/tomcat11",
			"-Dcatalina.base=/srv/tomcat", "-Djava.io.tmpdir=/srv/tomcat/temp", "org.apache.catalina.startup.Bootstrap", "start",
		}}},

		{[]string{e2e + "busybox:1.29-2"}, []*tree{busybox, critest}, shell},
		{[]string{e2e + "httpd:2.4.39-4"}, []*tree{busybox, httpd}, v1.Config{Cmd: []string{"httpd", "-D", "FOREGROUND"}}},
		{[]string{e2e + "nonewprivs:1.3"}, []*tree{busybox, nnp}, v1.Config{Entrypoint: []string{"/nonewprivs"}}},
		{[]string{staging + "test-image-predefined-group:latest"}, []*tree{busybox, critest}, v1.Config{Cmd: []string{"sh"}, User: "1000"}},
		{[]string{staging + "test-image-latest:latest"}, []*tree{busybox, marked("latest")}, shell},
		{[]string{staging + "test-image-digest:latest"}, []*tree{busybox, marked("digest")}, shell},
		{[]string{staging + "test-image-tag:test"}, []*tree{busybox, marked("tag-test")}, shell},
		{[]string{staging + "test-image-tag:all"}, []*tree{busybox, marked("tag-all")}, shell},
		{[]string{staging + "test-image-tags:1", staging + "test-image-tags:2", staging + "test-image-tags:3"}, []*tree{busybox, marked("tags")}, shell},
	}
	for _, n := range []string{"1", "2", "3"} {
		specs = append(specs, spec{[]string{staging + "test-image-" + n + ":latest"}, []*tree{busybox, marked(n)}, shell})
	}
	for name, user := range map[string]string{"uid": "1002", "username": "www-data", "uid-group": "1003:users", "username-group": "www-data:100"} {
		specs = append(specs, spec{[]string{staging + "test-image-user-" + name + ":latest"}, []*tree{busybox}, v1.Config{Cmd: []string{"sh"}, User: user}})
	}
	return specs
}

// build assembles the image of a spec.
func (s *spec) build(layers map[*tree]v1.Layer) (v1.Image, error) {
	stack := make([]v1.Layer, len(s.trees))
	for i, t := range s.trees {
		if layers[t] == nil {
			l, err := t.layer()
			if err != nil {
				return nil, err
			}
			layers[t] = l
		}
		stack[i] = layers[t]
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(img, stack...)
	if err != nil {
		return nil, err
	}
	config := s.config
	config.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, config.Env...)
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Architecture, file.OS, file.Config = "amd64", "linux", config
	return mutate.ConfigFile(img, file)
}
