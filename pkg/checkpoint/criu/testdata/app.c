#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <fcntl.h>
#include <string.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/mman.h>
#include <sys/file.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <sys/stat.h>
/* A small program with one of each thing that a report should name. */
static void *th(void *a){ for(;;) pause(); }
int main(void){
  pthread_t t; pthread_create(&t,0,th,0);
  int fd=open("/tmp/ghost",O_RDWR|O_CREAT,0600); write(fd,"hello",5); unlink("/tmp/ghost");
  int l=open("/tmp/locked",O_RDWR|O_CREAT,0600); write(l,"x",1); flock(l,LOCK_EX);
  mkfifo("/tmp/fifo",0600); int ff=open("/tmp/fifo",O_RDWR);
  int one=1; int s=socket(AF_INET,SOCK_STREAM,0);
  struct sockaddr_in a={.sin_family=AF_INET,.sin_port=htons(8080)}; setsockopt(s,SOL_SOCKET,SO_REUSEADDR,&one,sizeof one);
  bind(s,(void*)&a,sizeof a); listen(s,5);
  a.sin_addr.s_addr=htonl(INADDR_LOOPBACK);
  int c=socket(AF_INET,SOCK_STREAM,0); connect(c,(void*)&a,sizeof a); accept(s,0,0);
  int p=socket(AF_INET,SOCK_STREAM,0); connect(p,(void*)&a,sizeof a); /* never accepted */
  int u=socket(AF_INET6,SOCK_DGRAM,0); struct sockaddr_in6 a6={.sin6_family=AF_INET6,.sin6_port=htons(53)}; bind(u,(void*)&a6,sizeof a6);
  int x=socket(AF_UNIX,SOCK_STREAM,0); struct sockaddr_un ua={.sun_family=AF_UNIX}; strcpy(ua.sun_path,"/tmp/sock"); bind(x,(void*)&ua,sizeof ua); listen(x,5);
  char *m=mmap(0,1<<20,PROT_READ|PROT_WRITE,MAP_PRIVATE|MAP_ANONYMOUS,-1,0); memset(m,0x5a,64<<10);
  char *sh=mmap(0,1<<16,PROT_READ|PROT_WRITE,MAP_SHARED|MAP_ANONYMOUS,-1,0); sh[0]=1;
  char *fm=mmap(0,1,PROT_READ|PROT_WRITE,MAP_SHARED,l,0);
  if(fork()==0){ for(;;) pause(); }
  if(fork()==0) _exit(7);
  FILE*r=fopen("/tmp/ready","w"); fclose(r);
  for(;;) pause();
}
